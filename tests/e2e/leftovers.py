"""What a mesh could leave behind: processes, ports, shared memory, files."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.mesh_process import MeshProcess

GONE_TIMEOUT_S = 20.0
_SHM = Path("/dev/shm")


def named_segments() -> set[str]:
    return set(os.listdir(_SHM)) if _SHM.is_dir() else set()  # noqa: PTH208


@dataclass(slots=True)
class Traces:
    """Collected while a mesh is up; looked at when it is gone."""

    run_parent: Path
    """TMPDIR of the mesh, so that its run directory is here."""
    processes: list[psutil.Process] = field(default_factory=list)
    addresses: set[str] = field(default_factory=set)
    _segments: set[str] = field(default_factory=named_segments)

    @property
    def environment(self) -> dict[str, str]:
        return {"TMPDIR": str(self.run_parent)}

    def note(self, mesh: MeshProcess) -> None:
        """Remember every process, the launcher's other children too, and every address."""
        self.processes += psutil.Process(mesh.launcher.pid).children(recursive=True)
        for entry in mesh.processes():
            self.processes.append(psutil.Process(entry["pid"]))
            self.addresses |= set(entry["addresses"].values())

    def assert_none(self) -> None:
        """No process lives, every port can be bound, /dev/shm is as it was."""
        _, alive = psutil.wait_procs(self.processes, timeout=GONE_TIMEOUT_S)
        assert not alive
        for address in self.addresses:
            if not address.startswith("unix:"):
                host, _, port = address.rpartition(":")
                with socket.create_server((host, int(port))):
                    pass
        assert named_segments() <= self._segments

    def assert_no_files(self) -> None:
        """Not after the launcher was killed: then the next launcher removes what is there."""
        assert not list(self.run_parent.iterdir())


@contextmanager
def traces() -> Iterator[Traces]:
    with tempfile.TemporaryDirectory(prefix="it-") as folder:  # short, for a socket's name
        yield Traces(Path(folder))
