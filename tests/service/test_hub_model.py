"""A model by its Hugging Face id, through huggingface_hub, from a hub on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import tiny_checkpoint

MODEL_ID = "acme/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNWANTED = "pytorch_model.bin"


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a hub to fetch one revision of one model."""

    files: dict[str, bytes]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        prefix = f"/{MODEL_ID}/resolve/{COMMIT}/"
        if path == f"/api/models/{MODEL_ID}/revision/main":
            siblings = [{"rfilename": name} for name in self.files]
            info: dict[str, Any] = {"id": MODEL_ID, "sha": COMMIT, "siblings": siblings}
            self.reply(200, json.dumps(info).encode())
        elif path == f"/api/models/{MODEL_ID}/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": COMMIT}
                for name, data in self.files.items()
            ]
            self.reply(200, json.dumps(tree).encode())
        elif path.startswith(prefix) and (data := self.files.get(path.removeprefix(prefix))):
            self.reply(200, data)
        else:
            self.reply(404, b"{}", **{"X-Error-Code": "RepoNotFound"})

    def reply(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        headers |= {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body))}
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def hub(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its URL, and what it was asked for."""
    asked: list[str] = []
    handler = type("HubOfFiles", (Hub,), {"files": files, "asked": asked})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    directory = tiny_checkpoint(tmp_path)
    return {path.name: path.read_bytes() for path in directory.iterdir()} | {UNWANTED: b"pickle"}


def located(model: str, url: str, home: Path) -> "subprocess.CompletedProcess[str]":
    """`locate_model` in a process of its own, whose hub is at `url`."""
    code = (
        "import sys; from pathlib import Path\n"
        "from engine.checkpoint import locate_model\n"
        f"print(locate_model({model!r}, cache_dir=Path({str(home)!r})))"
    )
    without_proxies = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**without_proxies, "HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_model_is_fetched_once_and_found_without_a_network_afterwards(
    tmp_path: Path, files: dict[str, bytes]
) -> None:
    home = tmp_path / "home"
    with hub(files) as (url, asked):
        first = located(MODEL_ID, url, home)
    assert first.returncode == 0, first.stderr
    path = Path(first.stdout.strip())
    fetched = {file.name: file.read_bytes() for file in path.iterdir()}
    assert fetched == {name: data for name, data in files.items() if name != UNWANTED}
    assert not any(UNWANTED in request for request in asked)
    again = located(MODEL_ID, url, home)  # where nobody listens any more
    assert again.returncode == 0, again.stderr
    assert Path(again.stdout.strip()) == path


def test_an_id_that_the_hub_does_not_have_is_named(tmp_path: Path) -> None:
    with hub({}) as (url, _):
        result = located("acme/other", url, tmp_path / "home")
    assert result.returncode == 1
    assert "acme/other is neither a path here nor can it be fetched" in result.stderr
