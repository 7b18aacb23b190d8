"""The Helm chart: lint, rendering with many values, and that the result is valid Kubernetes."""

import json
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from engine.parallel import ParallelLayout
from tests.tools.helm import run_helm

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "isthmus"
Object = dict[str, Any]
KUBERNETES_VERSIONS = ("1.30", "1.34")


def rendered(*flags: str) -> list[Object]:
    """All objects of the chart with these flags of `helm template`."""
    result = run_helm("template", "mesh", str(CHART), *flags)
    assert result.returncode == 0, result.stderr
    return [document for document in yaml.safe_load_all(result.stdout) if document]


def named(objects: list[Object], kind: str) -> dict[str, Object]:
    return {o["metadata"]["name"]: o for o in objects if o["kind"] == kind}


def container(deployment: Object) -> Object:
    main: Object = deployment["spec"]["template"]["spec"]["containers"][0]
    return main


EVERYTHING = (
    *("--set", "prefill.autoscaling.enabled=true", "--set", "decode.autoscaling.enabled=true"),
    *("--set", "gateway.autoscaling.enabled=true"),
    *("--set", "telemetry.otlpEndpoint=http://jaeger:4317"),
    *("--set", "model.volume.persistentVolumeClaim.claimName=models"),
    *("--set", "model.id=/models/llama", "--set", "imagePullSecrets[0].name=pull"),
    *("--set", "decode.tolerations[0].key=gpu", "--set", "decode.tolerations[0].operator=Exists"),
    *("--set", "decode.nodeSelector.pool=decode", "--set", "extraEnv[0].name=HF_HUB_OFFLINE"),
    *("--set-string", "extraEnv[0].value=1", "--set", "decode.extraArgs[0]=--log-level=debug"),
    *("--set", "store.enabled=true", "--set", "store.replicas=2"),
    *("--set", "store.spillVolume.emptyDir.sizeLimit=20Gi"),
    *("--set-json", 'decode.resources={"limits":{"nvidia.com/gpu":1,"cpu":"4"}}'),
)
EXTERNAL_REDIS = ("--set", "redis.enabled=false", "--set", "redis.url=redis://elsewhere:6379/1")
SECRET_REDIS = (
    *("--set", "redis.enabled=false", "--set", "redis.existingSecret.name=redis"),
    *("--set", "redis.existingSecret.key=url"),
)
STORE = ("--set", "store.enabled=true")
GROUPS = ("--set", "prefill.parallel=ep=4", "--set-string", r"decode.parallel=tp=2\,pp=3")
BARE = ("--set", "networkPolicy.enabled=false", "--set", "podDisruptionBudget.enabled=false")


def known_to_kubernetes(one: Object) -> list[Object]:
    """The object, or where it is of a resource that is installed later, the pods in it."""
    if one["kind"] != "LeaderWorkerSet":
        return [one]
    group = one["spec"]["leaderWorkerTemplate"]
    return [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": pod}
        for name, pod in ranks_of(group)
    ]


def ranks_of(group: Object) -> list[tuple[str, Object]]:
    return [(name, group[f"{name}Template"]) for name in ("leader", "worker")]


def test_lint_finds_nothing() -> None:
    result = run_helm("lint", "--strict", str(CHART))
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    "flags",
    [(), EVERYTHING, EXTERNAL_REDIS, SECRET_REDIS, BARE, STORE, GROUPS, (*GROUPS, *EVERYTHING)],
    ids=[
        *("defaults", "everything", "external-redis", "secret-redis", "bare"),
        *("store", "groups", "groups-everything"),
    ],
)
@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_object_is_valid(flags, version) -> None:
    objects = rendered(*flags)
    assert len(objects) >= 4
    for one in objects:
        for known in known_to_kubernetes(one):
            kubernetes_validate.validate(known, version, strict=True)


def test_pools_scale_on_their_own() -> None:
    deployments = named(
        rendered("--set", "prefill.replicas=3", "--set", "decode.replicas=5"), "Deployment"
    )
    assert deployments["mesh-isthmus-prefill"]["spec"]["replicas"] == 3
    assert deployments["mesh-isthmus-decode"]["spec"]["replicas"] == 5
    assert deployments["mesh-isthmus-gateway"]["spec"]["replicas"] == 2


def test_an_autoscaled_pool_leaves_its_replicas_to_the_autoscaler() -> None:
    objects = rendered("--set", "decode.autoscaling.enabled=true")
    assert "replicas" not in named(objects, "Deployment")["mesh-isthmus-decode"]["spec"]
    scalers = named(objects, "HorizontalPodAutoscaler")
    assert list(scalers) == ["mesh-isthmus-decode"]
    assert scalers["mesh-isthmus-decode"]["spec"]["scaleTargetRef"]["name"] == "mesh-isthmus-decode"


@pytest.mark.parametrize("role", ["gateway", "prefill", "decode", "store"])
def test_a_pod_has_time_to_drain_and_says_over_grpc_whether_it_serves(role) -> None:
    deployment = named(rendered(*STORE, "--set", f"{role}.drainSeconds=77"), "Deployment")[
        f"mesh-isthmus-{role}"
    ]
    pod, main = deployment["spec"]["template"]["spec"], container(deployment)
    assert "--drain-grace-s=77" in main["args"]
    assert pod["terminationGracePeriodSeconds"] > 77
    assert main["readinessProbe"]["grpc"] == {"port": 50051}
    assert main["lifecycle"]["preStop"]["sleep"]["seconds"] > 0
    assert pod["securityContext"]["runAsNonRoot"]
    assert main["securityContext"]["readOnlyRootFilesystem"]


@pytest.mark.parametrize(
    ("parallel", "size"),
    [("tp=2", 2), (r"tp=2\,pp=3", 6), (r"tp=2\,ep=2", 2), ("ep=4", 4), (r"dp=2\,tp=2\,ep=4", 4)],
)
def test_a_worker_of_several_ranks_is_a_leader_worker_set(parallel, size) -> None:
    objects = rendered("--set-string", f"decode.parallel={parallel}", "--set", "decode.replicas=3")
    assert "mesh-isthmus-decode" not in named(objects, "Deployment")
    spec = named(objects, "LeaderWorkerSet")["mesh-isthmus-decode"]["spec"]
    group = spec["leaderWorkerTemplate"]
    assert spec["replicas"] == 3
    assert group["size"] == size == ParallelLayout.parse(parallel.replace("\\", "")).num_ranks
    assert group["restartPolicy"] == "RecreateGroupOnPodRestart"
    for name, pod in ranks_of(group):
        (main,) = pod["spec"]["containers"]
        values = {entry["name"]: entry.get("value") for entry in main["env"]}
        assert f"--parallel={parallel}".replace("\\", "") in main["args"]
        assert values["RANK"] == "$(LWS_WORKER_INDEX)"
        assert values["WORLD_SIZE"] == "$(LWS_GROUP_SIZE)"
        assert values["MASTER_ADDR"] == "$(LWS_LEADER_ADDRESS)"
        assert values["MASTER_PORT"] == "29500"
        # Only the leader answers; a follower's end is the leader's.
        assert ("readinessProbe" in main) == (name == "leader")
        assert ("annotations" in pod["metadata"]) == (name == "leader")


def test_an_autoscaled_pool_of_groups_names_its_kind() -> None:
    objects = rendered(*GROUPS, "--set", "decode.autoscaling.enabled=true")
    assert "replicas" not in named(objects, "LeaderWorkerSet")["mesh-isthmus-decode"]["spec"]
    scaler = named(objects, "HorizontalPodAutoscaler")["mesh-isthmus-decode"]
    assert scaler["spec"]["scaleTargetRef"] == {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "name": "mesh-isthmus-decode",
    }


def test_ranks_reach_each_other_on_any_port_and_strangers_on_none() -> None:
    for role in ("prefill", "decode"):
        policy = named(rendered(*GROUPS), "NetworkPolicy")[f"mesh-isthmus-{role}"]
        from_mesh, from_all = policy["spec"]["ingress"]
        assert "ports" not in from_mesh
        assert from_all["ports"] == [{"port": "metrics", "protocol": "TCP"}]


def test_a_gateway_without_workers_is_not_restarted() -> None:
    """Its gRPC health follows the pools, so liveness must ask something else."""
    main = container(named(rendered(), "Deployment")["mesh-isthmus-gateway"])
    assert main["livenessProbe"]["httpGet"]["path"] == "/live"
    assert main["startupProbe"]["httpGet"]["path"] == "/live"


def test_a_store_runs_only_where_it_is_asked_for_and_fits_its_pod() -> None:
    assert "mesh-isthmus-store" not in named(rendered(), "Deployment")
    objects = rendered(*STORE, "--set", "store.spillVolume.emptyDir.sizeLimit=20Gi")
    deployment = named(objects, "Deployment")["mesh-isthmus-store"]
    main = container(deployment)
    assert "--memory-bytes=4294967296" in main["args"], "no float, no exponent"
    assert main["resources"]["requests"]["memory"] == "5Gi"
    assert {"--spill-dir=/spill", "--spill-bytes=17179869184"} <= set(main["args"])
    volumes = deployment["spec"]["template"]["spec"]["volumes"]
    assert {"name": "spill", "emptyDir": {"sizeLimit": "20Gi"}} in volumes
    assert {"name": "spill", "mountPath": "/spill"} in main["volumeMounts"]


def test_selectors_match_their_pods_and_no_others() -> None:
    objects = rendered(*STORE)
    pods = {
        name: one["spec"]["template"]["metadata"]["labels"]
        for name, one in named(objects, "Deployment").items()
    }
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        for name, one in named(objects, kind).items():
            spec = one["spec"]
            selector = spec.get("podSelector") or spec["selector"]
            wanted = selector.get("matchLabels", selector).items()
            assert [pod for pod, labels in pods.items() if wanted <= labels.items()] == [name], kind


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--set", "decode.replica=2"), "replica"),
        (("--set", "decode.replicas=0"), "replicas"),
        (("--set", "model.dtype=int4"), "dtype"),
        (("--set", "model.kvDtype=int4"), "kvDtype"),
        (("--set", "store.memoryBytes=4Gi"), "memoryBytes"),
        (("--set", "decode.parallel=tp2"), "parallel"),
        (("--set", "prefill.parallel=xp=2"), "parallel"),
        (("--set", "telemetry.otlpEndpoint=jaeger:4317"), "otlpEndpoint"),
        (("--set", "redis.enabled=false"), "set redis.url or redis.existingSecret"),
    ],
)
def test_a_wrong_value_is_refused_by_name(flags, message) -> None:
    result = run_helm("template", "mesh", str(CHART), *flags)
    assert result.returncode != 0
    assert message in result.stderr


def test_every_value_is_in_the_schema() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())
    assert values.keys() <= schema["properties"].keys()
    for name in ("gateway", "prefill", "decode", "store", "model", "redis"):
        assert values[name].keys() <= schema["properties"][name]["properties"].keys()
