"""The command line of each container, from the compose file and the chart, as a local process.

Only what a container brings with it is replaced: addresses, ports and the model.
"""

import asyncio
import json
import os
import re
import shutil
import socket
import sys
import urllib.request
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import tiny_checkpoint
from tests.e2e.test_deploy_chart import container, named, ranks_of, rendered

DEPLOY = Path(__file__).parents[2] / "deploy"
ROLES = ("gateway", "prefill", "decode", "store")
READY_TIMEOUT_S = 120.0


def compose() -> dict[str, Any]:
    """The compose file with ${NAME:-default} replaced by the default."""
    text = (DEPLOY / "compose.yaml").read_text()
    document: dict[str, Any] = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    return document


def compose_commands() -> dict[str, tuple[list[str], dict[str, str]]]:
    services = compose()["services"]
    return {role: (services[role]["command"], services[role]["environment"]) for role in ROLES}


def chart_commands(redis_url: str, *flags: str) -> dict[str, tuple[list[str], dict[str, str]]]:
    """Of each pod: `role`, or `role-follower` for a rank that does not serve."""
    redis = ("--set", "redis.enabled=false", "--set", f"redis.url={redis_url}")
    objects = rendered(*redis, "--set", "store.enabled=true", *flags)
    deployments, groups = named(objects, "Deployment"), named(objects, "LeaderWorkerSet")
    commands = {}
    for role in ROLES:
        name = f"mesh-isthmus-{role}"
        if name in deployments:
            commands[role] = expanded(container(deployments[name]), {})
            continue
        group = groups[name]["spec"]["leaderWorkerTemplate"]
        port = str(free_port())  # here all pods have one address
        for rank, (_, pod) in enumerate(ranks_of(group)):
            given = {
                "LWS_WORKER_INDEX": str(rank),
                "LWS_GROUP_SIZE": str(group["size"]),
                "LWS_LEADER_ADDRESS": "127.0.0.1",
            }
            arguments, environment = expanded(pod["spec"]["containers"][0], given)
            commands[f"{role}-follower" if rank else role] = (
                arguments,
                {**environment, "MASTER_PORT": port},
            )
    return commands


def expanded(main: dict[str, Any], given: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment with $(NAME) replaced as the kubelet does."""
    assert "command" not in main, "the image's entry point runs"
    environment = {"POD_IP": "127.0.0.1", "OMP_NUM_THREADS": "1", **given}

    def with_values(text: str) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: environment[match[1]], text)

    for entry in main["env"]:
        if "value" in entry:
            environment[entry["name"]] = with_values(entry["value"])
    return [with_values(argument) for argument in main["args"]], environment


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def overrides(role: str, model: Path, redis_url: str, ready_file: Path) -> list[str]:
    """Later flags win: free ports, a small model, and a Redis that is there."""
    flags = [f"--model={model}", f"--redis-url={redis_url}", f"--ready-file={ready_file}"]
    if role == "gateway":
        return [*flags, "--http-port=0", "--grpc-port=0"]
    flags += ["--port=0", "--metrics-port=0", "--kv-pool-bytes=8000000", "--num-threads=1"]
    flags += ["--advertise-address=127.0.0.1:0", "--data-address=0.0.0.0:0"]
    return [*flags, "--memory-bytes=8000000"] if role == "store" else flags


@asynccontextmanager
async def local_processes(commands, *, model, redis_url, folder):
    """Run `isthmus COMMAND` for each pod; yield their addresses once all are ready."""
    async with AsyncExitStack() as stack:
        processes = {}
        for name, (command, environment) in commands.items():
            role = name.partition("-")[0]
            output = stack.enter_context((folder / f"{name}.log").open("wb"))
            processes[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "deploy.cli", *command),
                *overrides(role, model, redis_url, folder / f"{role}.json"),
                env={**os.environ, **environment, "OTEL_EXPORTER_OTLP_ENDPOINT": ""},
                stdout=output,
                stderr=output,
            )
            stack.push_async_callback(reaped, processes[name])
        async with asyncio.timeout(READY_TIMEOUT_S):
            addresses = {role: await addresses_of(role, processes[role], folder) for role in ROLES}
        yield addresses
        for name, process in processes.items():
            with suppress(ProcessLookupError):  # a follower ends with its leader
                process.terminate()
            assert await process.wait() == 0, (folder / f"{name}.log").read_text()


async def reaped(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
        await process.wait()


async def addresses_of(
    role: str, process: asyncio.subprocess.Process, folder: Path
) -> dict[str, str]:
    while True:
        assert process.returncode is None, (folder / f"{role}.log").read_text()
        if (ready_file := folder / f"{role}.json").exists():
            addresses: dict[str, str] = json.loads(ready_file.read_text())["addresses"]
            return addresses
        await asyncio.sleep(0.05)


def complete(http: str) -> dict[str, Any]:
    body = json.dumps({"prompt": "An isthmus is", "max_tokens": 4, "model": model_of(http)})
    request = urllib.request.Request(
        f"http://{local(http)}/v1/completions",
        data=body.encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


def model_of(http: str) -> str:
    with urllib.request.urlopen(f"http://{local(http)}/v1/models", timeout=10) as response:
        model: str = json.load(response)["data"][0]["id"]
        return model


def local(address: str) -> str:
    return address.replace("0.0.0.0", "127.0.0.1")


async def until_healthy(http: str) -> None:
    def is_healthy() -> bool:
        try:
            with urllib.request.urlopen(f"http://{local(http)}/health", timeout=10) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    async with asyncio.timeout(30):
        while True:
            if await asyncio.to_thread(is_healthy):
                return
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("source", ["compose", "chart", "chart-groups"])
async def test_the_containers_commands_make_a_mesh_that_answers(
    tmp_path, redis_url, source
) -> None:
    model = tiny_checkpoint(tmp_path / "models")
    groups = ("--set", "prefill.parallel=pp=2", "--set", "decode.parallel=tp=2")
    commands = {
        "compose": compose_commands,
        "chart": lambda: chart_commands(redis_url),
        "chart-groups": lambda: chart_commands(redis_url, *groups),
    }[source]()
    async with local_processes(
        commands, model=model, redis_url=redis_url, folder=tmp_path
    ) as addresses:
        http = addresses["gateway"]["http"]
        await until_healthy(http)
        answer = await asyncio.to_thread(complete, http)
        assert answer["usage"]["completion_tokens"] == 4


def test_containers_know_the_ports_that_the_image_exposes() -> None:
    exposed = re.search(r"^EXPOSE (.+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert exposed is not None
    ports = {int(port) for port in exposed[1].split()}
    named_ports = set()
    for command, _ in compose_commands().values():
        flags = [flag for flag in command if re.match(r"--[\w-]*(port|address)=", flag)]
        named_ports |= {int(re.split("[:=]", flag)[-1]) for flag in flags}
    assert named_ports == ports


def test_every_long_lived_service_of_the_compose_file_has_a_health_check() -> None:
    services = compose()["services"]
    assert services.keys() == {"redis", "gateway", "prefill", "decode", "store", "jaeger"}
    image_has_one = "HEALTHCHECK" in (DEPLOY / "Dockerfile").read_text()
    for name, service in services.items():
        assert "healthcheck" in service or ("build" in service and image_has_one), name
    assert services["store"]["profiles"] == ["store"], "it takes memory: only where it is wanted"
    for role in ("prefill", "decode", "store"):
        assert "ports" not in services[role], "a published port would not survive --scale"
        assert "container_name" not in services[role]


@pytest.mark.skipif(shutil.which("docker") is None, reason="no docker command here")
def test_docker_reads_the_compose_file() -> None:
    import subprocess

    result = subprocess.run(
        ["docker", "compose", "-f", str(DEPLOY / "compose.yaml"), "config", "--quiet"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "is not a docker command" in result.stderr or "unknown shorthand flag" in result.stderr:
        pytest.skip("docker has no compose plugin here")
    assert result.returncode == 0, result.stderr
