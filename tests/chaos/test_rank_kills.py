"""A rank of a worker dies or stops mid-answer: no token is lost, and the worker comes back."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.checkpoints import tiny_checkpoint
from tests.e2e.mesh_process import MeshProcess, mesh_process

BODY = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
TIMEOUT_S = 2
"""Of a collective: what a stopped rank costs."""


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[MeshProcess]:
    model = tiny_checkpoint(tmp_path, num_attention_heads=4, num_hidden_layers=4)
    flags = ("--model", str(model), "--prefill", "0", "--decode", "2", "--decode-parallel", "tp=2")
    environment = {"ISTHMUS_COLLECTIVES__COLLECTIVE_TIMEOUT_S": str(TIMEOUT_S)}
    with mesh_process(tmp_path, *flags, environment=environment) as running:
        yield running


def stream(mesh: MeshProcess) -> Iterator[str]:
    """Text of each chunk of a streamed completion."""
    body = {**BODY, "stream": True}
    with httpx.stream("POST", f"{mesh.http}/v1/completions", json=body, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                yield from (choice["text"] for choice in event["choices"])


def busy_worker(mesh: MeshProcess) -> dict[str, Any]:
    for entry in mesh.processes("decode"):
        url = f"http://{entry['addresses']['metrics']}/metrics"
        for line in httpx.get(url, timeout=10).text.splitlines():
            if line.startswith("isthmus_engine_running_sequences") and float(line.split()[-1]) > 0:
                return entry
    raise AssertionError("no decode worker runs a sequence")


def until_back(mesh: MeshProcess, name: str) -> dict[str, Any]:
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        for entry in mesh.processes("decode"):
            if entry["name"] == name and entry["num_restarts"] > 0:
                return entry
        time.sleep(0.1)
    raise AssertionError(f"{name} did not come back: {mesh.processes('decode')}")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_costs_no_token_and_its_worker_comes_back(
    how: signal.Signals, mesh: MeshProcess
) -> None:
    expected = "".join(stream(mesh))
    chunks: list[str] = []
    victim: dict[str, Any] = {}
    for chunk in stream(mesh):
        chunks.append(chunk)
        if len(chunks) == 5:
            victim = busy_worker(mesh)
            os.kill(victim["rank_pids"][1], how)
    assert "".join(chunks) == expected
    assert mesh.metric("gateway", "isthmus_gateway_degradations_total", kind="migration") >= 1
    back = until_back(mesh, victim["name"])
    assert set(back["rank_pids"]).isdisjoint(victim["rank_pids"])
    assert not any(psutil.pid_exists(pid) for pid in victim["rank_pids"])
    assert "".join(stream(mesh)) == expected
