"""One service of the mesh, of one process or one for each rank: started, watched, restarted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.launcher.os_process import OsProcess, describe_exit
from deploy.launcher.ready_file import ProcessState, ReadyRecord, read_ready_file
from engine.errors import IsthmusError

logger = logging.getLogger(__name__)

_READY_POLL_S = 0.02
_GROUP_END_S = 2.0
"""Once a rank has ended, how long the others have to say so and end by themselves."""


class StartError(IsthmusError):
    """A process ended, or stayed silent, before it was ready; the text holds its own words."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Backoff:
    """Pause before a crashed service is started again: doubles; a calm time resets it."""

    first_s: float = 0.25
    longest_s: float = 15.0
    calm_s: float = 60.0

    def after(self, num_crashes: int) -> float:
        return min(self.longest_s, self.first_s * 2.0 ** min(num_crashes - 1, 30))


@dataclass(frozen=True, kw_only=True, slots=True)
class ChildSpec:
    """How one service is run."""

    name: str
    role: str
    command: Callable[[ReadyRecord | None], Sequence[str]]
    """The command line, given what the service said when it was last ready: a gateway started
    again must listen on the same ports."""
    environments: Callable[[], Sequence[Mapping[str, str]]]
    """One for each rank, asked for at each start; the first rank is the one that serves."""
    inherited_fds: tuple[int, ...] = ()
    wait_ready: Callable[[int], Awaitable[ReadyRecord]]
    """Returns once the first rank, with this pid, serves; cancelled if any rank ends first."""
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
    """Runs a ChildSpec. `start`, then `keep` until cancelled, then `stop`.

    Its ranks live and die together: the end of any one ends the others.
    """

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
        self._ranks: list[OsProcess] = []

    @property
    def is_running(self) -> bool:
        return bool(self._ranks) and all(rank.returncode is None for rank in self._ranks)

    @property
    def pid(self) -> int | None:
        """Of the first rank."""
        return self._ranks[0].pid if self._ranks else None

    def state(self) -> ProcessState | None:
        """The entry for the state file; None while the service does not serve."""
        if self.ready is None or not self.is_running or self.ready.pid != self.pid:
            return None  # self.ready outlives the process that said it
        return ProcessState(
            name=self.spec.name,
            role=self.spec.role,
            pid=self.ready.pid,
            addresses=self.ready.addresses,
            num_restarts=self.num_restarts,
            rank_pids=tuple(rank.pid for rank in self._ranks),
        )

    async def start(self) -> None:
        """Start every rank and return once the service serves.

        Raises:
            StartError: a rank ended or all were silent for too long; nothing of it is left.
        """
        await self._spawn()
        ready = asyncio.ensure_future(self.spec.wait_ready(self._ranks[0].pid))
        try:
            await asyncio.wait(
                (ready, *(rank.exited for rank in self._ranks)),
                timeout=self.spec.ready_timeout_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if not ready.done():
                raise await self._start_error()
            self.ready = ready.result()
            self._on_change()
        finally:
            ready.cancel()

    async def keep(self) -> None:
        """Start the service again whenever a rank ends; runs until cancelled."""
        num_crashes = 0
        loop = asyncio.get_running_loop()
        while True:
            assert self._ranks, "keep() before start()"
            started_s = loop.time()
            await self._one_ended()
            ended = next(rank for rank in self._ranks if rank.returncode is not None)
            if loop.time() - started_s > self.spec.backoff.calm_s:
                num_crashes = 0
            num_crashes += 1
            self.num_restarts += 1
            self._on_change()
            pause_s = self.spec.backoff.after(num_crashes)
            logger.warning(
                "%s (pid %d) %s; starting %s again in %.2f s (restart %d)\n%s",
                ended.name,
                ended.pid,
                describe_exit(ended.exited.result()),
                "it" if len(self._ranks) == 1 else f"all {len(self._ranks)} ranks",
                pause_s,
                self.num_restarts,
                await self._end_all(),
            )
            await asyncio.sleep(pause_s)
            try:
                await self.start()
            except StartError as error:
                logger.warning("%s", error)
            else:
                logger.warning("%s serves again", self.spec.name)

    async def stop(self, *, hurry: asyncio.Event) -> None:
        """SIGTERM, then SIGKILL after the drain time or as soon as `hurry` is set; reap all.

        The first rank gets the signal: the others end when it does.
        """
        if not self._ranks:
            return
        first = self._ranks[0]
        if first.returncode is None:
            first.terminate()
            await _first_of(asyncio.shield(first.exited), hurry.wait(), timeout_s=self.spec.drain_s)
            if first.returncode is None and not hurry.is_set():
                logger.warning("%s did not drain within %.0f s", self.spec.name, self.spec.drain_s)
        if not hurry.is_set():
            await self._wait_for_ranks()
        for rank in self._ranks:
            await rank.kill()

    async def _spawn(self) -> None:
        command = self.spec.command(self.ready)
        environments = self.spec.environments()
        name = self.spec.name
        self._ranks = []
        for index, environment in enumerate(environments):
            process = await OsProcess.start(
                name if len(environments) == 1 else f"{name} rank {index}",
                command,
                environment,
                inherited_fds=self.spec.inherited_fds,
                on_output=self._on_output,
            )
            self._ranks.append(process)

    async def _one_ended(self) -> None:
        exits = [rank.exited for rank in self._ranks]
        await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)

    async def _wait_for_ranks(self) -> None:
        """Give the other ranks of one that has ended a moment: rank 0 tells whom it was serving."""
        await asyncio.wait([rank.exited for rank in self._ranks], timeout=_GROUP_END_S)

    async def _end_all(self) -> str:
        """Leave nothing of the service running; returns the last words of each rank."""
        await self._wait_for_ranks()
        for rank in self._ranks:
            await rank.kill()
        words = [await rank.last_words() for rank in self._ranks]
        return "\n".join(part for part in words if part)

    async def _start_error(self) -> StartError:
        name = self.spec.name
        ended = [rank for rank in self._ranks if rank.returncode is not None]
        if not ended:
            reason = f"{name} was not ready within {self.spec.ready_timeout_s:g} s"
            for rank in self._ranks:
                await rank.kill()
        else:
            code = ended[0].exited.result()
            reason = f"{ended[0].name} could not start: it {describe_exit(code)}"
        last_words = await self._end_all()
        for rank in [*ended, *self._ranks]:
            if told := await rank.told_error():
                return StartError(f"{rank.name} could not start: {told}")
        return StartError(f"{reason}\n{last_words}".rstrip())


async def _first_of(*waits: Awaitable[object], timeout_s: float) -> None:
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
