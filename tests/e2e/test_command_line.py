"""`isthmus chat`, `status` and `health` against a real mesh."""

import subprocess
import sys

from tests.e2e.mesh_process import MeshProcess


def isthmus(*arguments: str, typed: str = "") -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "deploy.cli", *arguments],
        input=typed,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_chat_remembers_the_conversation_until_it_is_told_to_forget(demo_mesh: MeshProcess) -> None:
    typed = "Name the capital of France.\nAnd of Italy?\n/reset\nHi\n/quit\n"
    flags = ("--address", demo_mesh.grpc, "--max-tokens", "24", "--temperature", "0")
    result = isthmus("chat", *flags, typed=typed)
    assert result.returncode == 0, result.stderr
    assert "Paris" in result.stdout
    prefills = [
        int(line.partition("prefill ")[2].split()[0])
        for line in result.stderr.splitlines()
        if line.startswith("queue ")
    ]
    first, second, third = prefills
    assert third < first < second, "the second question came with the first one and its answer"


def test_chat_without_a_mesh_says_so() -> None:
    result = isthmus("chat", "--address", "127.0.0.1:1", typed="Hi\n/quit\n")
    assert "127.0.0.1:1" in result.stderr
    assert "Traceback" not in result.stderr


def test_status_shows_the_pools_of_a_given_redis(demo_mesh: MeshProcess) -> None:
    result = isthmus("status", "--redis-url", demo_mesh.processes("redis")[0]["addresses"]["redis"])
    assert result.returncode == 0, result.stderr
    for role in ("gateway", "prefill", "decode"):
        assert f"{role}-" in result.stderr


def test_health_of_every_server(demo_mesh: MeshProcess) -> None:
    for role in ("gateway", "prefill", "decode"):
        result = isthmus("health", demo_mesh.processes(role)[0]["addresses"]["grpc"])
        assert (result.returncode, result.stdout.strip()[-7:]) == (0, "SERVING"), role
    assert isthmus("health", "127.0.0.1:1").returncode == 1
