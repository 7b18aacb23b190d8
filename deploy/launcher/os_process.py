"""One operating system process: started, its output read, ended with all that it started."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from deploy import child

_NUM_KEPT_LINES = 40
_ERROR_PREFIX = "error: "


class OsProcess:
    """A process that leads a session of its own and dies with this one; made by `start`."""

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        on_output: Callable[[str, str], None],
    ) -> None:
        self.name = name
        self.pid = process.pid
        self.exited = asyncio.create_task(process.wait(), name=f"{name}-exit")
        """Its return code."""
        self._process = process
        self._on_output = on_output
        self._last_lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)
        assert process.stdout is not None, "asked for a pipe"
        self._reader = asyncio.create_task(self._read_output(process.stdout), name=f"{name}-output")

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        inherited_fds: Sequence[int],
        on_output: Callable[[str, str], None],
    ) -> Self:
        """Run `command`; each line that it prints goes to `on_output(name, line)`."""
        wrapper = (sys.executable, "-S", "-E", child.__file__, str(os.getpid()))
        # NOTE: the death signal belongs to the thread that forks, so this must be the main thread.
        process = await asyncio.create_subprocess_exec(
            *wrapper,
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(environment),
            pass_fds=tuple(inherited_fds),
        )
        return cls(name, process, on_output)

    @property
    def returncode(self) -> int | None:
        """None while it runs; as subprocess has it."""
        return self._process.returncode

    def terminate(self) -> None:
        """Ask it to end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()

    async def kill(self) -> None:
        """Kill it and whatever it started, and reap it."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        await self.exited
        await self._finish_output()

    async def told_error(self) -> str:
        """The line in which a service says why it ends (mesh.process.report_failure), or ""."""
        await self._finish_output()
        lines = [line for line in self._last_lines if line.startswith(_ERROR_PREFIX)]
        return lines[-1].removeprefix(_ERROR_PREFIX) if lines else ""

    async def last_words(self) -> str:
        """The last lines that it printed, each with its name."""
        await self._finish_output()
        return "\n".join(f"  {self.name}: {line}" for line in self._last_lines if line)

    async def _read_output(self, stream: asyncio.StreamReader) -> None:
        rest = b""
        while chunk := await stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take_line(line)
        if rest:
            self._take_line(rest)

    def _take_line(self, line: bytes) -> None:
        text = line.decode(errors="replace").rstrip()
        self._last_lines.append(text)
        self._on_output(self.name, text)

    async def _finish_output(self) -> None:
        """Read to the end of the pipe, unless a grandchild still holds it open."""
        await asyncio.wait((self._reader,), timeout=1.0)
        self._reader.cancel()


def describe_exit(code: int) -> str:
    """A return code in words: "exited with status 2", "was killed by SIGSEGV"."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
