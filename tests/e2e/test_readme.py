"""The README's examples, word for word but for the ports, against a real mesh."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.mesh_process import MeshProcess

README = (Path(__file__).parents[2] / "README.md").read_text()
PYTHON_EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
MAX_GRPC_LINES = 10


def pointed_at(mesh: MeshProcess, text: str) -> str:
    for address, actual in (("127.0.0.1:8000", mesh.http[7:]), ("127.0.0.1:50051", mesh.grpc)):
        text = text.replace(address, actual)
    return text


@pytest.mark.parametrize("index", range(len(PYTHON_EXAMPLES)))
def test_a_python_example_answers(demo_mesh: MeshProcess, index: int) -> None:
    result = subprocess.run(
        [sys.executable, "-c", pointed_at(demo_mesh, PYTHON_EXAMPLES[index])],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 50


def test_there_are_an_openai_example_and_a_grpc_client_in_ten_lines() -> None:
    openai_example, grpc_example = PYTHON_EXAMPLES
    assert "from openai import OpenAI" in openai_example
    assert "InferenceStub" in grpc_example
    assert len([line for line in grpc_example.splitlines() if line.strip()]) <= MAX_GRPC_LINES


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl here")
def test_the_curl_example_streams(demo_mesh: MeshProcess) -> None:
    (example,) = re.findall(r"^    (curl .*(?:\\\n.*)*(?:\n  +\S.*)*)", README, re.MULTILINE)
    result = subprocess.run(
        ["bash", "-c", pointed_at(demo_mesh, example)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("data: {"), result.stdout
    assert result.stdout.endswith("data: [DONE]\n\n"), result.stdout[-200:]
