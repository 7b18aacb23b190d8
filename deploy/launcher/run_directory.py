"""A private directory for one mesh's sockets and ready files, gone when the mesh is gone."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "isthmus-run-"
_LOCK = "launcher.lock"
STATE_FILE = "state.json"


@contextmanager
def run_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make the directory, readable by its owner only; remove it on exit.

    A launcher that was killed could not remove its own, so each launcher first removes those whose
    lock nobody holds any more.
    """
    parent = parent or Path(tempfile.gettempdir())
    remove_stale(parent)
    path, lock = _locked_directory(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _locked_directory(parent: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (path / _LOCK).exists():  # else another launcher took it for stale before it was locked
            return path, lock
        os.close(lock)


def local_state_files(parent: Path | None = None) -> list[Path]:
    """State files of our own meshes that are up on this machine."""
    found = []
    for path in sorted(_own_directories(parent or Path(tempfile.gettempdir()))):
        with suppress(OSError), _locked(path) as is_stale:
            if not is_stale and (path / STATE_FILE).is_file():
                found.append(path / STATE_FILE)
    return found


def remove_stale(parent: Path) -> None:
    """Remove our own run directories under `parent` that belong to no living launcher."""
    for path in _own_directories(parent):
        with suppress(OSError), _locked(path) as is_stale:
            if is_stale:
                shutil.rmtree(path, ignore_errors=True)


def _own_directories(parent: Path) -> list[Path]:
    found = []
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid():
                found.append(path)
    return found


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Hold the directory's lock if nobody else does, and say whether; OSError without a lock."""
    lock = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)
