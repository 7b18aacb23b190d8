"""One process of the mesh: started, watched, started again after a crash, stopped."""

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy import child
from deploy.launcher.ready_file import ProcessState, ReadyRecord, read_ready_file
from engine.errors import IsthmusError

logger = logging.getLogger(__name__)

_READY_POLL_S = 0.02
_NUM_KEPT_LINES = 40
_ERROR_PREFIX = "error: "


class StartError(IsthmusError):
    """A process ended, or stayed silent, before it was ready; the text holds its own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Pause before a crashed process is started again: doubles; a calm time resets it."""

    first_s: float = 0.25
    longest_s: float = 15.0
    calm_s: float = 60.0

    def after(self, num_crashes: int) -> float:
        return min(self.longest_s, self.first_s * 2.0 ** min(num_crashes - 1, 30))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """How one process is run."""

    name: str
    role: str
    command: Callable[[ReadyRecord | None], Sequence[str]]
    """The command line, given what the process said when it was last ready: a gateway started
    again must listen on the same ports."""
    environment: Mapping[str, str]
    inherited_fds: tuple[int, ...] = ()
    wait_ready: Callable[[int], Awaitable[ReadyRecord]]
    """Returns once the process with this pid serves; cancelled if it ends first."""
    ready_timeout_s: float
    drain_s: float
    """Time from SIGTERM to SIGKILL."""
    backoff: Backoff = Backoff()


async def ready_file_written(path: Path, pid: int) -> ReadyRecord:
    """Wait for the ready file of the process `pid`; one left by a predecessor does not count."""
    while True:
        record = read_ready_file(path)
        if record is not None and record.pid == pid:
            return record
        await asyncio.sleep(_READY_POLL_S)


class ChildProcess:
    """Runs a ChildSpec. `start`, then `keep` until cancelled, then `stop`."""

    def __init__(
        self,
        spec: ChildSpec,
        *,
        on_change: Callable[[], None],
        on_output: Callable[[str, str], None],
    ) -> None:
        self.spec = spec
        self.ready: ReadyRecord | None = None
        self.num_restarts = 0
        self._on_change = on_change
        self._on_output = on_output
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._last_lines: deque[str] = deque(maxlen=_NUM_KEPT_LINES)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def state(self) -> ProcessState | None:
        """The entry for the state file; None while the process is not serving."""
        if self.ready is None or not self.is_running or self.ready.pid != self.pid:
            return None  # self.ready outlives the process that said it
        return ProcessState(
            name=self.spec.name,
            role=self.spec.role,
            pid=self.ready.pid,
            addresses=self.ready.addresses,
            num_restarts=self.num_restarts,
        )

    async def start(self) -> None:
        """Start the process and return once it serves.

        Raises:
            StartError: it ended or was silent for too long; nothing of it is left.
        """
        process = await self._spawn()
        ended = asyncio.create_task(process.wait(), name=f"{self.spec.name}-exit")
        ready = asyncio.ensure_future(self.spec.wait_ready(process.pid))
        try:
            await asyncio.wait(
                (ended, ready),
                timeout=self.spec.ready_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ready.done():
                raise await self._start_error()
            self.ready = ready.result()
            self._on_change()
        finally:
            ended.cancel()
            ready.cancel()

    async def keep(self) -> None:
        """Start the process again whenever it ends; runs until cancelled."""
        num_crashes = 0
        loop = asyncio.get_running_loop()
        while True:
            assert self._process is not None, "keep() before start()"
            started_s = loop.time()
            code = await self._process.wait()
            if loop.time() - started_s > self.spec.backoff.calm_s:
                num_crashes = 0
            num_crashes += 1
            self.num_restarts += 1
            self._on_change()
            pause_s = self.spec.backoff.after(num_crashes)
            logger.warning(
                "%s (pid %d) %s; starting it again in %.2f s (restart %d)\n%s",
                self.spec.name,
                self._process.pid,
                describe_exit(code),
                pause_s,
                self.num_restarts,
                await self._last_words(),
            )
            await asyncio.sleep(pause_s)
            try:
                await self.start()
            except StartError as error:
                logger.warning("%s", error)
            else:
                logger.warning("%s serves again", self.spec.name)

    async def stop(self, *, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL after the drain time or as soon as `hurry` is set; reap it."""
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            await _first_of(process.wait(), hurry.wait(), timeout_s=self.spec.drain_s)
            if process.returncode is None and not hurry.is_set():
                logger.warning("%s did not drain within %.0f s", self.spec.name, self.spec.drain_s)
        self._kill_session(process)
        await process.wait()
        await self._finish_output()

    async def _spawn(self) -> asyncio.subprocess.Process:
        self._last_lines.clear()
        wrapper = (sys.executable, "-S", "-E", child.__file__, str(os.getpid()))
        # NOTE: the death signal belongs to the thread that forks, so this must be the main thread.
        process = await asyncio.create_subprocess_exec(
            *wrapper,
            *self.spec.command(self.ready),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=dict(self.spec.environment),
            pass_fds=self.spec.inherited_fds,
        )
        self._process = process
        assert process.stdout is not None, "asked for a pipe"
        self._reader = asyncio.create_task(
            self._read_output(process.stdout), name=f"{self.spec.name}-output"
        )
        return process

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
        self._on_output(self.spec.name, text)

    async def _start_error(self) -> StartError:
        process = self._process
        assert process is not None, "called by start()"
        name = self.spec.name
        if process.returncode is None:
            reason = f"{name} was not ready within {self.spec.ready_timeout_s:g} s"
        else:
            reason = f"{name} could not start: it {describe_exit(process.returncode)}"
        self._kill_session(process)
        await process.wait()
        last_words = await self._last_words()
        if told := self._told_error():
            return StartError(f"{name} could not start: {told}")
        return StartError(f"{reason}\n{last_words}".rstrip())

    def _told_error(self) -> str:
        """The line in which a service says why it ends (mesh.process.report_failure)."""
        lines = [line for line in self._last_lines if line.startswith(_ERROR_PREFIX)]
        return lines[-1].removeprefix(_ERROR_PREFIX) if lines else ""

    async def _last_words(self) -> str:
        await self._finish_output()
        return "\n".join(f"  {self.spec.name}: {line}" for line in self._last_lines if line)

    async def _finish_output(self) -> None:
        """Read to the end of the pipe, unless a grandchild still holds it open."""
        if self._reader is not None:
            await asyncio.wait((self._reader,), timeout=1.0)
            self._reader.cancel()

    @staticmethod
    def _kill_session(process: asyncio.subprocess.Process) -> None:
        """Kill the process and whatever it started: each child leads a session of its own."""
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


async def _first_of(*waits: Awaitable[object], timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def describe_exit(code: int) -> str:
    """A return code in words: "exited with status 2", "was killed by SIGSEGV"."""
    if code >= 0:
        return f"exited with status {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
