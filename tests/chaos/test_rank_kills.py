"""A rank of a worker dies or stops while requests run: no token is lost, the worker comes back."""

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.checkpoints import tiny_checkpoint
from tests.e2e.held import held, idle
from tests.e2e.mesh_process import MeshProcess, mesh_process

PROMPT = "Once upon a time, on a narrow strip of land between two seas, there lived a baker. " * 4
BODY = {"prompt": PROMPT, "max_tokens": 400, "temperature": 0, "ignore_eos": True}
ENDED = {
    signal.SIGKILL: r"rank [01] \(pid [0-9]+\) (was killed by SIGKILL|exited with status 1)",
    signal.SIGSTOP: r"rank 0 \(pid [0-9]+\) exited with status 1",
}
BLAMED = {
    signal.SIGKILL: "rank 1 is gone",
    signal.SIGSTOP: "rank 1 (has been silent for|did not come within) 2 s",
}
TIMEOUT_S = 2
"""Of silence: what a stopped rank costs."""
ENVIRONMENT = {"ISTHMUS_COLLECTIVES__COLLECTIVE_TIMEOUT_S": str(TIMEOUT_S)}
MAX_TRIES = 10
DEGRADATIONS = "isthmus_gateway_degradations_total"
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
HANDOVERS = "isthmus_handovers_total"


def model_of_four_layers(folder: Path) -> Path:
    return tiny_checkpoint(
        folder, num_attention_heads=4, num_hidden_layers=4, max_position_embeddings=1024
    )


def mixture(folder: Path) -> Path:
    """Its experts lie across the data shards: each rank computes tokens of all of them."""
    return tiny_checkpoint(
        folder,
        "qwen2_moe",
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        max_position_embeddings=1024,
    )


def answer(mesh: MeshProcess) -> str:
    return "".join(mesh.stream(BODY))


def value_of(entry: dict[str, Any], name: str) -> float:
    """A metric of one process."""
    url = f"http://{entry['addresses']['metrics']}/metrics"
    # Without TLS, of which the roots would be read each time: it is in a hurry.
    for line in httpx.get(url, timeout=10, verify=False).text.splitlines():
        if line.startswith(f"{name} "):
            return float(line.split()[-1])
    raise AssertionError(f"{name} is not among the metrics of {entry['name']}")


def until(condition: Callable[[], Any], what: Callable[[], object]) -> Any:
    end_s = time.monotonic() + 60
    while not (found := condition()):
        assert time.monotonic() < end_s, what()
        time.sleep(0.05)
    return found


def has_work(entry: dict[str, Any]) -> bool:
    queues = ("isthmus_engine_running_sequences", "isthmus_engine_waiting_sequences")
    return sum(value_of(entry, name) for name in queues) > 0


class HealthWatch:
    """What the health service of a worker says, until the worker is gone."""

    def __init__(self, entry: dict[str, Any], pool: ThreadPoolExecutor) -> None:
        """Return once it has said something."""
        self._said: list[int] = []
        self._end = pool.submit(self._watch, entry["addresses"]["grpc"])
        until(lambda: self._said, lambda: "health is silent")

    def last(self) -> int:
        """Its last word, once the worker is gone."""
        self._end.result(timeout=60)
        return self._said[-1]

    def _watch(self, address: str) -> None:
        options = (("grpc.enable_http_proxy", 0),)
        with grpc.insecure_channel(address, options=options) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            try:
                for response in watch:
                    self._said.append(response.status)
            except grpc.RpcError:
                return


def wait_until_back(mesh: MeshProcess, victim: dict[str, Any]) -> None:
    """All ranks are new, the gateway knows the worker again, and nobody holds anything."""

    def is_back() -> bool:
        entries = mesh.processes(victim["role"])
        return any(
            entry["name"] == victim["name"] and entry["num_restarts"] > victim["num_restarts"]
            for entry in entries
        )

    until(is_back, mesh.processes)
    assert not any(psutil.pid_exists(pid) for pid in victim["rank_pids"])
    num_workers = len(mesh.processes(victim["role"]))
    gauge = {"role": victim["role"]}
    until(
        lambda: mesh.metric("gateway", "isthmus_gateway_workers", **gauge) == num_workers,
        lambda: f"the gateway does not see {num_workers} workers",
    )
    until(lambda: held(mesh) == idle(mesh), lambda: held(mesh))


def check_log(log: str, name: str, how: signal.Signals) -> None:
    """The launcher names the process that ended, its rank 0 the rank that is to blame."""
    assert re.search(rf"isthmus: {name} {ENDED[how]}; starting all 2 ranks again", log)
    assert re.search(rf" {name} rank 0: .* ERROR {name[:-2]} .*: rank=1 .*{BLAMED[how]}", log)
    assert f"isthmus: {name} serves again" in log


def answer_that_loses_a_rank(
    mesh: MeshProcess, how: signal.Signals, expected: str
) -> dict[str, Any]:
    """Have one, in the middle of which its decode worker loses rank 1; that worker's entry.

    Nobody decodes while it is found out who does. On a busy machine an answer may be over before:
    then again.
    """
    for _ in range(MAX_TRIES):
        before = mesh.metric("gateway", DEGRADATIONS, kind="migration")
        chunks: list[str] = []
        victim: dict[str, Any] | None = None
        for chunk in mesh.stream(BODY):
            chunks.append(chunk)
            if len(chunks) == 5:
                entries = mesh.processes("decode")
                for entry in entries:
                    os.kill(entry["rank_pids"][1], signal.SIGSTOP)
                victim = next(filter(has_work, entries), None)
                for entry in entries:
                    os.kill(entry["rank_pids"][1], how if entry is victim else signal.SIGCONT)
        assert "".join(chunks) == expected, how
        if victim is not None:
            assert mesh.metric("gateway", DEGRADATIONS, kind="migration") == before + 1
            return victim
    raise AssertionError(f"{MAX_TRIES} answers were over before it was known who computed them")


@pytest.mark.parametrize(
    ("model_in", "parallel", "ways"),
    [
        pytest.param(model_of_four_layers, "tp=2", (*ENDED,), id="tp"),
        pytest.param(mixture, "dp=2,ep=2", (signal.SIGKILL,), id="dp-ep"),
    ],
)
def test_a_lost_rank_of_a_decode_worker_costs_no_token(
    tmp_path: Path, model_in: Callable[[Path], Path], parallel: str, ways: Sequence[signal.Signals]
) -> None:
    flags = ("--model", str(model_in(tmp_path)), "--decode", "2", "--decode-parallel", parallel)
    with (
        ThreadPoolExecutor() as pool,  # its threads watch until the mesh is down
        mesh_process(tmp_path, *flags, environment=ENVIRONMENT) as mesh,
    ):
        expected = answer(mesh)
        victims: list[tuple[str, signal.Signals]] = []
        for how in ways:
            health = {entry["name"]: HealthWatch(entry, pool) for entry in mesh.processes("decode")}
            victim = answer_that_loses_a_rank(mesh, how, expected)
            assert health[victim["name"]].last() == NOT_SERVING
            wait_until_back(mesh, victim)
            assert answer(mesh) == expected, how
            victims.append((victim["name"], how))
        until(lambda: held(mesh) == idle(mesh), lambda: held(mesh))
    for name, how in victims:
        check_log(mesh.log(), name, how)


def test_a_lost_rank_of_a_prefill_worker_costs_no_token(tmp_path: Path) -> None:
    model = model_of_four_layers(tmp_path)
    flags = ("--model", str(model), "--prefill-parallel", "tp=2")
    with (
        ThreadPoolExecutor() as pool,  # its threads watch until the mesh is down
        mesh_process(tmp_path, *flags, environment=ENVIRONMENT) as mesh,
    ):
        expected = answer(mesh)
        for how in ENDED:
            before = mesh.metric("gateway", DEGRADATIONS, kind="local_prefill")
            (victim,) = mesh.processes("prefill")
            rank_pid = victim["rank_pids"][1]
            health = HealthWatch(victim, pool)
            os.kill(rank_pid, signal.SIGSTOP)  # so that the prompt is there, and not through
            answering = pool.submit(answer, mesh)
            until(lambda: has_work(victim), lambda: held(mesh))  # noqa: B023
            os.kill(rank_pid, how)
            assert answering.result(timeout=120) == expected, how
            assert mesh.metric("gateway", DEGRADATIONS, kind="local_prefill") == before + 1
            assert health.last() == NOT_SERVING
            wait_until_back(mesh, victim)
            before = mesh.metric("prefill", HANDOVERS, outcome="committed")
            assert answer(mesh) == expected, how
            assert mesh.metric("prefill", HANDOVERS, outcome="committed") == before + 1
            until(lambda: held(mesh) == idle(mesh), lambda: held(mesh))
    for how in ENDED:
        check_log(mesh.log(), "prefill-0", how)
