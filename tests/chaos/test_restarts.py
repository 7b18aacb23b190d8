"""Each process is killed in turn: the launcher starts it again, and the mesh is whole again."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import tiny_checkpoint
from tests.e2e.leftovers import Traces, traces
from tests.e2e.mesh_process import MeshProcess, mesh_process

WHOLE_TIMEOUT_S = 60.0
BODY = {
    "prompt": "An isthmus is a narrow strip of land",
    "max_tokens": 20,
    "temperature": 0,
    "ignore_eos": True,
    "isthmus": {"report": True},
}


def status(left: Traces) -> str:
    """What `isthmus status` prints about the only mesh under this TMPDIR."""
    result = subprocess.run(
        [sys.executable, "-m", "deploy.cli", "status"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, **left.environment, "COLUMNS": "200"},
    )
    return result.stdout + result.stderr


def is_whole(mesh: MeshProcess, shown: str) -> bool:
    """Whether the table has one row a service, and each is of the process that serves now."""
    entries = [entry for entry in mesh.processes() if entry["role"] != "redis"]
    rows = [line for line in shown.splitlines() if "serving" in line]
    return len(entries) == len(rows) == 3 and all(
        any(f"{entry['role']}-" in row and f"-{entry['pid']}-" in row for row in rows)
        for entry in entries
    )


def wait_until_whole(mesh: MeshProcess, left: Traces) -> None:
    deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
    while not is_whole(mesh, shown := status(left)):
        assert time.monotonic() < deadline_s, f"{shown}\n{mesh.processes()}"


def wait_until_restarted(mesh: MeshProcess, role: str, pid: int) -> dict[str, Any]:
    deadline_s = time.monotonic() + WHOLE_TIMEOUT_S
    while True:
        entries = [entry for entry in mesh.processes(role) if entry["pid"] != pid]
        if entries:
            return entries[0]
        assert time.monotonic() < deadline_s, mesh.processes()


def ask(mesh: MeshProcess) -> tuple[str, list[Any]]:
    answer = httpx.post(f"{mesh.http}/v1/completions", json=BODY, timeout=60)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"][0]["text"], body["isthmus"]["degradations"]


@pytest.mark.timeout(400)
def test_each_killed_process_is_replaced_and_none_leaves_anything(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    with traces() as left:
        flags = ("--model", str(model))
        with mesh_process(tmp_path, *flags, environment=left.environment) as mesh:
            left.note(mesh)
            wait_until_whole(mesh, left)
            expected, degradations = ask(mesh)
            assert not degradations
            for role in ("prefill", "decode", "gateway", "redis"):
                addresses = mesh.processes(role)[0]["addresses"]
                pid = mesh.kill(role)
                entry = wait_until_restarted(mesh, role, pid)
                assert entry["num_restarts"] == 1
                if role in {"gateway", "redis"}:
                    assert entry["addresses"] == addresses, "clients know these"
                left.note(mesh)
                wait_until_whole(mesh, left)
                assert ask(mesh) == (expected, []), role
        left.assert_none()
        left.assert_no_files()
