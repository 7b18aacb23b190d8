"""Any one process dies; the client sees one whole answer, and nothing stays behind."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.mesh_process import MeshProcess, mesh_process

NUM_TOKENS = 200
BODY = {
    "prompt": "Once upon a time, on a narrow strip of land between two seas, there lived",
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
}


@pytest.fixture
def mesh(tmp_path: Path) -> Iterator[MeshProcess]:
    flags = ("--dtype", "float32", "--prefill", "2", "--decode", "2")
    with mesh_process(tmp_path, *flags) as running:
        yield running


def undisturbed_answer(mesh: MeshProcess) -> str:
    return "".join(mesh.stream(BODY))


def test_decode_worker_killed_mid_stream_loses_no_token(mesh: MeshProcess) -> None:
    expected = undisturbed_answer(mesh)
    chunks = []
    for number, chunk in enumerate(mesh.stream(BODY)):
        chunks.append(chunk)
        if number == 20:
            busy = _busy_decode_worker(mesh)
            mesh.kill("decode", busy)
    assert "".join(chunks) == expected
    assert mesh.metric("gateway", "isthmus_gateway_degradations_total", kind="migration") >= 1


def test_prefill_worker_killed_is_replaced_by_the_other(mesh: MeshProcess) -> None:
    expected = undisturbed_answer(mesh)
    mesh.kill("prefill", 0)
    for _ in range(4):
        assert undisturbed_answer(mesh) == expected


def test_redis_killed_the_mesh_serves_on(mesh: MeshProcess) -> None:
    expected = undisturbed_answer(mesh)
    mesh.kill("redis")
    assert undisturbed_answer(mesh) == expected


def test_launcher_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    with mesh_process(tmp_path, "--dtype", "float32") as mesh:
        children = [psutil.Process(entry["pid"]) for entry in mesh.processes()]
        mesh.launcher.kill()
        _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def _busy_decode_worker(mesh: MeshProcess) -> int:
    """Index of the decode worker that has drawn tokens most lately: the one with a running one."""
    for index, entry in enumerate(mesh.processes("decode")):
        url = f"http://{entry['addresses']['metrics']}/metrics"
        for line in httpx.get(url, timeout=10).text.splitlines():
            if line.startswith("isthmus_engine_running_sequences") and float(line.split()[-1]) > 0:
                return index
    raise AssertionError("no decode worker runs a sequence")
