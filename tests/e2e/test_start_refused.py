"""`isthmus up` that cannot start: one clear line, status 1, at once, and nothing left behind."""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file, save_file

from tests.checkpoints import tiny_checkpoint, write_gguf

AT_ONCE_S = 30.0
"""Importing torch takes seconds on a busy machine; the time-out of a start is two minutes."""


@pytest.fixture(scope="module")
def good_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path)


@pytest.fixture
def run_parent() -> Iterator[Path]:
    """Where the launcher makes its run directory; short, for the sake of a socket's name."""
    with tempfile.TemporaryDirectory(prefix="it-") as folder:
        yield Path(folder)


def refused(run_parent: Path, *flags: str) -> str:
    """What `isthmus up` says on stderr."""
    before = set(psutil.Process().children(recursive=True))
    shared_memory = set(os.listdir("/dev/shm"))  # noqa: PTH208
    state_file = run_parent / "state.json"
    started_s = time.monotonic()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "deploy.cli", "up", "--http-port", "0", "--grpc-port", "0"),
            *("--state-file", str(state_file), *flags),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "TMPDIR": str(run_parent)},
    )
    took_s = time.monotonic() - started_s
    assert result.returncode == 1, result.stderr
    assert took_s < AT_ONCE_S, result.stderr
    assert result.stdout == "", "it was not ready"
    lines = result.stderr.strip().splitlines()
    told = [line for line in lines if line.startswith("isthmus: ")]
    assert len(told) == 1, result.stderr
    assert lines[-1] == told[0], result.stderr
    assert "Traceback" not in result.stderr
    assert not list(run_parent.iterdir())
    assert set(psutil.Process().children(recursive=True)) == before
    assert set(os.listdir("/dev/shm")) <= shared_memory  # noqa: PTH208
    sys.stdout.write(f"{took_s:.1f} s: {told[0]}\n")
    return told[0].removeprefix("isthmus: ")


def test_truncated_weights(model: Path, run_parent: Path) -> None:
    weights = model / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    told = refused(run_parent, "--model", str(model))
    assert "model.safetensors" in told
    assert "truncated" in told


def test_truncated_gguf(good_model: Path, tmp_path: Path, run_parent: Path) -> None:
    gguf = write_gguf(good_model, tmp_path / "cut.gguf")
    os.truncate(gguf, gguf.stat().st_size * 3 // 4)
    told = refused(run_parent, "--model", str(gguf))
    assert "cut.gguf" in told


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("intermediate_size", 128, "mlp"),
        ("num_hidden_layers", 4, "layers.3"),
        ("architectures", ["MambaForCausalLM"], "MambaForCausalLM"),
    ],
)
def test_a_configuration_that_does_not_match_the_weights(
    model: Path, run_parent: Path, field: str, value: object, words: str
) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    assert words in refused(run_parent, "--model", str(model))


def test_a_rank_that_cannot_load_its_part_is_named(model: Path, run_parent: Path) -> None:
    weights = model / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]  # of the last stage
    save_file(tensors, weights)
    flags = ("--prefill-parallel", "pp=2", "--decode-parallel", "pp=2")
    told = refused(run_parent, "--model", str(model), *flags)
    assert re.match(r"(prefill|decode)-0 rank \d could not start: ", told)  # all of them look
    assert "lacks model.norm.weight" in told


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors"])
def test_a_missing_file_is_named(model: Path, run_parent: Path, name: str) -> None:
    (model / name).unlink()
    told = refused(run_parent, "--model", str(model))
    assert name.partition(".")[2] in told
    assert str(model) in told


def test_a_broken_tokenizer_is_named(model: Path, run_parent: Path) -> None:
    (model / "tokenizer.json").write_text('{"version": "1.0"')
    assert "tokenizer.json" in refused(run_parent, "--model", str(model))


def test_a_model_that_is_not_there(tmp_path: Path, run_parent: Path) -> None:
    told = refused(run_parent, "--model", str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in told


@pytest.mark.parametrize("flag", ["--http-port", "--grpc-port"])
def test_a_port_in_use_is_named(good_model: Path, run_parent: Path, flag: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        told = refused(run_parent, "--model", str(good_model), flag, port)
    assert f"{flag} {port}" in told
    assert "choose another port, or 0" in told


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "http://127.0.0.1:6379",
        "redis://127.0.0.1:notaport",
        "unix:///nowhere/redis.sock",
        "redis://127.0.0.1:1",
        "redis://no-such-host.invalid:6379",
    ],
)
def test_a_wrong_redis_url_is_named(good_model: Path, run_parent: Path, url: str) -> None:
    told = refused(run_parent, "--model", str(good_model), "--redis-url", url)
    assert told.startswith("--redis-url")


def test_a_server_that_is_no_redis(good_model: Path, run_parent: Path) -> None:
    """It accepts and says nothing, as a firewall's tarpit or another protocol does."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        told = refused(run_parent, "--model", str(good_model), "--redis-url", url)
    assert told.startswith("--redis-url")


@pytest.mark.parametrize("place", ["", "file/state.json"])
def test_a_state_file_that_cannot_be_written_is_named(
    good_model: Path, run_parent: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    path = str(tmp_path / place)
    told = refused(run_parent, "--model", str(good_model), "--state-file", path)
    assert told.startswith(f"--state-file {path} cannot be written")


@pytest.mark.parametrize("module", ["prefill_worker", "decode_worker", "gateway"])
def test_a_service_alone_names_a_wrong_redis_before_it_loads_anything(
    good_model: Path, module: str
) -> None:
    url = "redis://127.0.0.1:1"
    result = subprocess.run(
        [sys.executable, "-m", module, "--model", str(good_model), "--redis-url", url],
        capture_output=True,
        text=True,
        timeout=AT_ONCE_S,
        check=False,
    )
    assert result.returncode == 1
    (told,) = result.stderr.splitlines()
    assert told.startswith(f"error: no usable Redis at {url}")


def test_a_device_that_is_not_there(good_model: Path, run_parent: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert "cuda" in refused(run_parent, "--model", str(good_model), "--device", "cuda")
