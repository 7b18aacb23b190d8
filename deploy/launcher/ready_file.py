"""What a service says once it serves: the ready file; and the state file made of all of them."""

import errno
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadyRecord:
    """Written by a service when it serves, atomically, as one JSON object."""

    role: str
    pid: int
    addresses: Mapping[str, str] = field(default_factory=dict)
    """host:port under "grpc", "http" and "metrics", where the service has them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProcessState:
    """One entry of the state file."""

    name: str
    role: str
    pid: int
    addresses: Mapping[str, str]
    num_restarts: int
    rank_pids: tuple[int, ...] = ()
    """The processes of the service: `pid` first, then the worker's other ranks."""


def read_ready_file(path: Path) -> ReadyRecord | None:
    """The record, or None while the service has not written it."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=ReadyRecord)
    except FileNotFoundError:
        return None


def write_state_file(path: Path, processes: Iterable[ProcessState]) -> None:
    """Replace the file in one step: a reader sees the old list or the new one."""
    text = json.dumps([asdict(process) for process in processes], indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    with os.fdopen(handle, "w") as file:
        file.write(text)
    Path(name).replace(path)


def check_state_file(path: Path) -> None:
    """Raise ValueError, naming the flag, if the file could not be written there."""
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--state-file {path} cannot be written ({error.strerror}); name another file"
        ) from error


def read_state_file(path: Path) -> list[ProcessState]:
    """The processes of a running mesh.

    Raises:
        ValueError: the file is not a state file.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[ProcessState])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not a state file of a mesh: {error}") from error
