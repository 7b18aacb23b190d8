"""However a mesh is ended, nothing of it stays; and `isthmus demo` from its start to its end."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.checkpoints import tiny_checkpoint
from tests.e2e.leftovers import traces
from tests.e2e.mesh_process import mesh_process

END_TIMEOUT_S = 30.0
SPLIT_LINE = re.compile(
    r"queue [\d.]+ ms \| prefill \d+ tokens in [\d.]+ ms \| handover [\d.]+ MB in [\d.]+ ms"
    r" \([\d.]+ GB/s, shm\) \| first decode step [\d.]+ ms \| [\d.]+ tokens/s"
)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_mesh_once_open_answers_have_ended(
    tmp_path: Path, tiny_model: Path, number: signal.Signals
) -> None:
    with traces() as left:
        flags = ("--model", str(tiny_model))
        with mesh_process(tmp_path, *flags, environment=left.environment) as mesh:
            left.note(mesh)
            body = {"prompt": "a", "max_tokens": 1500, "ignore_eos": True, "stream": True}
            with httpx.stream(
                "POST", f"{mesh.http}/v1/completions", json=body, timeout=60
            ) as answer:
                lines = answer.iter_lines()
                next(lines)
                mesh.launcher.send_signal(number)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]"
            assert json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
            assert mesh.launcher.wait(END_TIMEOUT_S) == 0
        assert not (tmp_path / "state.json").exists()
        left.assert_none()
        left.assert_no_files()


def test_a_killed_launcher_takes_all_with_it(tmp_path: Path, tiny_model: Path) -> None:
    with traces() as left:
        flags = ("--model", str(tiny_model))
        with mesh_process(tmp_path, *flags, environment=left.environment) as mesh:
            left.note(mesh)
            mesh.launcher.kill()
            mesh.launcher.wait(END_TIMEOUT_S)
            left.assert_none()


def demo_command(*flags: str) -> list[str]:
    ports = ("--http-port", "0", "--grpc-port", "0")
    return [sys.executable, "-m", "deploy.cli", "demo", *ports, *flags]


def test_demo_once_answers_says_where_the_time_went_and_ends() -> None:
    with traces() as left:
        no_network = {"PIP_INDEX_URL": "http://127.0.0.1:1", "PIP_NO_INDEX": "1"}
        before = set(psutil.Process().children(recursive=True))
        result = subprocess.run(
            demo_command("--once"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            env={**os.environ, **left.environment, **no_network},
        )
        assert result.returncode == 0, result.stderr
        ready, *answer, split = result.stdout.strip().splitlines()
        assert ready.startswith("isthmus is ready in ")
        assert len("".join(answer)) > 50
        assert SPLIT_LINE.search(split), split
        left.assert_none()
        left.assert_no_files()
        assert set(psutil.Process().children(recursive=True)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_stays_up_until_a_signal(number: signal.Signals) -> None:
    with traces() as left:
        launcher = subprocess.Popen(
            demo_command(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **left.environment},
        )
        try:
            assert launcher.stdout is not None
            output = []
            for line in launcher.stdout:
                output.append(line)
                if "Ctrl-C stops the mesh" in line:
                    break
            text = "".join(output)
            url = re.search(r"http://\S+/v1", text)
            assert url is not None, text
            assert httpx.get(f"{url[0]}/models", timeout=10).status_code == 200
            left.processes += psutil.Process(launcher.pid).children(recursive=True)
            assert len(left.processes) == 4
            left.addresses.add(url[0].removeprefix("http://").removesuffix("/v1"))
            launcher.send_signal(number)
            assert launcher.wait(END_TIMEOUT_S) == 0
        finally:
            launcher.kill()
            launcher.communicate()
        left.assert_none()
        left.assert_no_files()
