"""A whole mesh as a user starts it: `isthmus up`, found through its state file."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

READY_LINE = "isthmus is ready"
STOP_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class MeshProcess:
    """A mesh that is up."""

    launcher: "subprocess.Popen[str]"
    state_file: Path
    output: list[str] = field(default_factory=list)

    def log(self) -> str:
        """What the launcher printed: up to the ready line, and all of it once the mesh is down."""
        return "".join(self.output)

    def processes(self, role: str | None = None) -> list[dict[str, Any]]:
        state: list[dict[str, Any]] = json.loads(self.state_file.read_text())
        return [entry for entry in state if role in {None, entry["role"]}]

    @property
    def http(self) -> str:
        return f"http://{self.processes('gateway')[0]['addresses']['http']}"

    @property
    def grpc(self) -> str:
        address: str = self.processes("gateway")[0]["addresses"]["grpc"]
        return address

    def kill(self, role: str, index: int = 0, *, how: signal.Signals = signal.SIGKILL) -> int:
        pid: int = self.processes(role)[index]["pid"]
        os.kill(pid, how)
        return pid

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """Text of each chunk of a streamed completion."""
        url, body = f"{self.http}/v1/completions", {**body, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=120) as response:
            assert response.status_code == 200
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    yield from (choice["text"] for choice in event["choices"])

    def metric(self, role: str, name: str, /, **labels: str) -> float:
        """The sum of a metric's samples over the processes of a role."""
        total = 0.0
        for entry in self.processes(role):
            url = f"http://{entry['addresses']['metrics']}/metrics"
            with urllib.request.urlopen(url, timeout=10) as response:
                text = response.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name == name and labels.items() <= sample.labels.items():
                        total += sample.value
        return total


@contextmanager
def mesh_process(
    tmp_path: Path, *flags: str, environment: dict[str, str] | None = None
) -> Iterator[MeshProcess]:
    """Start a mesh on free ports, wait for its ready line, stop it with SIGTERM on exit."""
    state_file = tmp_path / "state.json"
    launcher = subprocess.Popen(
        [
            *(sys.executable, "-m", "deploy.cli", "up", "--http-port", "0", "--grpc-port", "0"),
            *("--state-file", str(state_file), *flags),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    output = []
    try:
        assert launcher.stdout is not None
        for line in launcher.stdout:
            output.append(line)
            if READY_LINE in line:
                break
        else:
            raise AssertionError(f"isthmus up ended with {launcher.wait()}:\n{''.join(output)}")
        yield MeshProcess(launcher, state_file, output)
    finally:
        launcher.send_signal(signal.SIGTERM)
        rest, _ = launcher.communicate(timeout=STOP_TIMEOUT_S)
        output.append(rest)
        sys.stdout.write("".join(output))  # shown by pytest when the test failed
