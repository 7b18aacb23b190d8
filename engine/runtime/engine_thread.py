"""The asyncio face of a StepEngine: one thread owns the engine, the loop owns the sinks.

Commands go over by a SimpleQueue, outputs come back by one `call_soon_threadsafe` a step. The
thread applies commands between steps and sleeps in the queue when nothing can run.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Self

from engine.errors import (
    DuplicateRequestError,
    EngineDeadError,
    IsthmusError,
    RankGroupError,
    UnknownRequestError,
)
from engine.request import Request
from engine.runtime.commands import (
    EngineEvent,
    EngineStats,
    ErrorEvent,
    EventSink,
    Reservation,
    SequenceMode,
    TokenEvent,
)
from engine.runtime.engine import (
    Abort,
    AdoptPrefix,
    CancelReservation,
    Command,
    CommitReservation,
    EngineOutput,
    HoldPrefix,
    PrefixEnded,
    Release,
    Reply,
    Reserve,
    StepEngine,
    Submit,
    TakePrefix,
)
from engine.runtime.stall_watch import StallWatch

logger = logging.getLogger(__name__)

_Answer = int | Reservation | IsthmusError | None
_Item = tuple[int, Command] | Exception | None
"""A numbered command, what the engine dies of, or the end."""


class EngineThread:
    """Implements RequestEngine and PrefixEngine; an async context manager, on one loop.

    `dead` is set when the thread has died: the process should end with a status other than 0.
    """

    def __init__(
        self,
        engine: StepEngine,
        *,
        step_timeout_s: float = 300.0,
        unclaimed_commit_timeout_s: float = 30.0,
    ) -> None:
        """Take over `engine`; nothing else may touch it from now on.

        Args:
            engine: is closed when the thread ends.
            step_timeout_s: a step that takes longer will not end: the thread counts as dead.
            unclaimed_commit_timeout_s: KV that was committed for a request that nobody submits is
                freed after this time, so that a gateway's death does not leak blocks.
        """
        self.dead = asyncio.Event()
        self.on_prefix_ended: Callable[[Sequence[bytes]], None] = lambda block_hashes: None
        """Called on the loop with the hashes of a sequence's cached full blocks when it ends."""
        self._engine = engine
        self._unclaimed_commit_timeout_s = unclaimed_commit_timeout_s
        self._commands: SimpleQueue[_Item] = SimpleQueue()
        self._modes: dict[str, SequenceMode] = {}
        self._sinks: dict[str, EventSink] = {}
        self._ending: dict[str, int] = {}
        self._unclaimed: dict[str, asyncio.TimerHandle] = {}
        self._replies: dict[int, asyncio.Future[_Answer]] = {}
        self._next_command_id = 0
        self._death: EngineDeadError | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stall_watch = StallWatch(step_timeout_s)
        self._watching: asyncio.Task[None] | None = None
        self._has_ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ready: asyncio.Future[None] | None = None

    async def __aenter__(self) -> Self:
        """Start the thread and wait until the engine is warm; its error is raised here."""
        self._loop = asyncio.get_running_loop()
        self._ready = self._loop.create_future()
        self._engine.watch(self._commands.put)
        self._engine.report_to(lambda outputs: self._post(self._deliver, outputs))
        self._thread.start()
        await self._ready
        self._watching = asyncio.create_task(self._watch_stalls(), name="engine-stalls")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        """Stop after the current step; what still runs gets an EngineDeadError.

        A step that has stalled is not waited for: it ends with the process.
        """
        self._commands.put(None)
        assert self._watching is not None, "not entered"
        ending = asyncio.create_task(self._has_ended.wait())
        await asyncio.wait({ending, self._watching}, return_when=asyncio.FIRST_COMPLETED)
        for task in (ending, self._watching):
            task.cancel()
        self._fail_all(EngineDeadError("the engine is stopped"))

    @property
    def death(self) -> EngineDeadError | None:
        """Why the thread is dead; it names the rank where one is to blame."""
        return self._death

    # RequestEngine, on the loop.

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    def check_submit(self, request: Request, mode: SequenceMode) -> None:
        """Raises what `submit` would raise now."""
        self._check_alive()
        request_id = request.request_id
        if request_id in self._modes or request_id in self._ending:
            raise DuplicateRequestError(f"request {request_id} is running")
        self._engine.limits.check_request(request, mode)

    def submit(self, request: Request, mode: SequenceMode, sink: EventSink) -> None:
        self.check_submit(request, mode)
        request_id = request.request_id
        self._modes[request_id] = mode
        self._sinks[request_id] = sink
        self._claim(request_id)
        self._put(Submit(request, mode))

    async def abort(self, request_id: str) -> int:
        return await self._end(request_id, Abort(request_id))

    async def release(self, request_id: str) -> int:
        if self._modes.get(request_id) not in {SequenceMode.PREFILL, None}:
            return 0
        return await self._end(request_id, Release(request_id))

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        self._check_alive()
        return await self._ask_blocks(Reserve(request_id, num_tokens, tuple(block_hashes)))

    async def commit(self, request_id: str, first_token_id: int) -> None:
        self._check_alive()
        await self._ask(CommitReservation(request_id, first_token_id))
        if request_id not in self._modes and self._loop is not None:
            self._claim(request_id)
            self._unclaimed[request_id] = self._loop.call_later(
                self._unclaimed_commit_timeout_s, self._drop_unclaimed, request_id
            )

    async def cancel_reservation(self, request_id: str) -> int:
        self._check_alive()
        return await self._ask_count(CancelReservation(request_id))

    # PrefixEngine, on the loop.

    def num_cached_blocks(self, block_hashes: Sequence[bytes]) -> int:
        return self._engine.num_cached_blocks(block_hashes)

    async def hold_prefix(self, hold_id: str, block_hashes: Sequence[bytes]) -> Reservation:
        self._check_alive()
        return await self._ask_blocks(HoldPrefix(hold_id, tuple(block_hashes)))

    async def take_prefix(self, hold_id: str, block_hashes: Sequence[bytes]) -> Reservation:
        self._check_alive()
        return await self._ask_blocks(TakePrefix(hold_id, tuple(block_hashes)))

    async def adopt_prefix(self, hold_id: str, num_blocks: int) -> None:
        self._check_alive()
        await self._ask(AdoptPrefix(hold_id, num_blocks))

    # Loop side.

    def _check_alive(self) -> None:
        if self._death is not None:
            raise self._death
        if self._loop is None:
            raise EngineDeadError("the engine is not started")

    def _put(self, command: Command) -> int:
        self._next_command_id += 1
        self._commands.put((self._next_command_id, command))
        return self._next_command_id

    async def _ask(self, command: Command) -> _Answer:
        """Send a command and wait for its answer; a cancelled wait leaves no trace."""
        assert self._loop is not None, "not started"
        future: asyncio.Future[_Answer] = self._loop.create_future()
        command_id = self._put(command)
        self._replies[command_id] = future
        try:
            return await future
        finally:
            self._replies.pop(command_id, None)

    async def _ask_blocks(self, command: Reserve | HoldPrefix | TakePrefix) -> Reservation:
        """As `_ask`; cancelling gives back what may have been granted."""
        hold_id = command.request_id if isinstance(command, Reserve) else command.hold_id
        try:
            answer = await self._ask(command)
        except asyncio.CancelledError:
            self._put(CancelReservation(hold_id))
            raise
        if not isinstance(answer, Reservation):
            raise UnknownRequestError(f"the reservation of request {hold_id} was cancelled")
        return answer

    async def _ask_count(self, command: Command) -> int:
        answer = await self._ask(command)
        assert isinstance(answer, int), f"{command} was answered by {answer!r}"
        return answer

    async def _end(self, request_id: str, command: Command) -> int:
        """Stop a request's events now; its id stays taken until its blocks are free."""
        self._check_alive()
        self._modes.pop(request_id, None)
        self._sinks.pop(request_id, None)
        self._claim(request_id)
        self._ending[request_id] = self._ending.get(request_id, 0) + 1
        # Shielded: the id must be given back even when the caller is cancelled.
        return await asyncio.shield(self._ended(request_id, command))

    def _ended(self, request_id: str, command: Command) -> "asyncio.Future[int]":
        assert self._loop is not None, "not started"
        result: asyncio.Future[int] = self._loop.create_future()
        answer: asyncio.Future[_Answer] = self._loop.create_future()
        self._replies[command_id := self._put(command)] = answer

        def on_answer(done: "asyncio.Future[_Answer]") -> None:
            self._replies.pop(command_id, None)
            self._ending[request_id] -= 1
            if not self._ending[request_id]:
                del self._ending[request_id]
            if result.done():
                return
            error = done.exception()
            if error is not None:
                result.set_exception(error)
                result.exception()  # retrieved, in case that nobody waits any more
            else:
                count = done.result()
                result.set_result(count if isinstance(count, int) else 0)

        answer.add_done_callback(on_answer)
        return result

    def _claim(self, request_id: str) -> None:
        timer = self._unclaimed.pop(request_id, None)
        if timer is not None:
            timer.cancel()

    def _drop_unclaimed(self, request_id: str) -> None:
        self._unclaimed.pop(request_id, None)
        if self._death is None:
            logger.warning("committed KV was never claimed, request_id=%s", request_id)
            self._put(Abort(request_id))

    def _deliver(self, outputs: Sequence[EngineOutput]) -> None:
        """Answer waiters and hand each sink its events of one step."""
        batches: dict[int, tuple[EventSink, list[EngineEvent]]] = {}
        for output in outputs:
            if isinstance(output, Reply):
                self._answer(output)
                continue
            if isinstance(output, PrefixEnded):
                self.on_prefix_ended(output.block_hashes)
                continue
            sink = self._sinks.get(output.request_id)
            if sink is None:  # aborted on the loop before the engine knew
                continue
            batches.setdefault(id(sink), (sink, []))[1].append(output)
            if _is_last(output, self._modes[output.request_id]):
                del self._sinks[output.request_id], self._modes[output.request_id]
        for sink, events in batches.values():
            sink.put(events)

    def _answer(self, reply: Reply) -> None:
        future = self._replies.pop(reply.command_id, None)
        if future is None or future.done():
            return
        if isinstance(reply.result, IsthmusError):
            future.set_exception(reply.result)
        else:
            future.set_result(reply.result)

    def _die(self, cause: BaseException) -> None:
        if isinstance(cause, EngineDeadError):
            self._fail_all(cause)
        else:
            self._fail_all(EngineDeadError(f"the engine thread died: {type(cause).__name__}"))
        self.dead.set()

    async def _watch_stalls(self) -> None:
        while True:
            await asyncio.sleep(self._stall_watch.interval_s)
            if (stall := self._stall_watch.stall) is not None:
                logger.error("the engine thread is stuck: %s", stall)
                self._die(stall)
                return

    def _fail_all(self, error: EngineDeadError) -> None:
        if self._death is not None:
            return
        self._death = error
        batches: dict[int, tuple[EventSink, list[EngineEvent]]] = {}
        for request_id, sink in self._sinks.items():
            batches.setdefault(id(sink), (sink, []))[1].append(ErrorEvent(request_id, error))
        self._sinks.clear()
        self._modes.clear()
        for sink, events in batches.values():
            sink.put(events)
        for future in list(self._replies.values()):
            if not future.done():
                future.set_exception(error)
        for timer in self._unclaimed.values():
            timer.cancel()

    # Engine thread.

    def _run(self) -> None:
        try:
            self._engine.prepare()
        except BaseException as error:  # noqa: BLE001 - raised again by __aenter__
            self._engine.close()
            self._post(self._fail_start, error)
            return
        self._post(self._set_ready)
        try:
            self._work()
        except BaseException as error:
            has_reason = isinstance(error, EngineDeadError)  # such as another rank's end
            blamed = f"rank={error.rank} " if isinstance(error, RankGroupError) else ""
            logger.exception("the engine thread died: %s%s", blamed, error, exc_info=not has_reason)
            self._post(self._die, error)
        finally:
            self._engine.close()
            self._post(self._has_ended.set)

    def _work(self) -> None:
        """Apply what was asked, step, sleep when there is nothing to do; until told to stop."""
        is_idle = True
        while True:
            self._stall_watch.end_step()
            if is_idle:
                self._engine.rest()
            commands = self._take_commands(is_waiting=is_idle)
            self._stall_watch.begin_step()
            outputs: list[EngineOutput] = []
            for item in commands:
                if item is None:
                    return
                if isinstance(item, Exception):
                    raise item
                outputs += self._engine.apply(*item)
            if outputs:
                self._post(self._deliver, outputs)
            stepped = self._engine.step()
            is_idle = stepped is None
            if stepped:
                self._post(self._deliver, stepped)

    def _take_commands(self, *, is_waiting: bool) -> list[_Item]:
        commands = [self._commands.get()] if is_waiting else []
        try:
            while True:
                commands.append(self._commands.get_nowait())
        except Empty:
            return commands

    def _post(self, callback: Callable[..., None], *args: object) -> None:
        assert self._loop is not None, "not started"
        try:
            self._loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed: nobody is left to tell
            logger.warning("the event loop is gone, an engine output is dropped")

    def _set_ready(self) -> None:
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    def _fail_start(self, error: BaseException) -> None:
        self._death = EngineDeadError("the engine did not start")
        self.dead.set()
        if self._ready is not None and not self._ready.done():
            self._ready.set_exception(error)


def _is_last(event: EngineEvent, mode: SequenceMode) -> bool:
    """Whether the request's id is free after this event; PREFILL lasts until its release."""
    if isinstance(event, TokenEvent):
        return event.finish_reason is not None and mode is not SequenceMode.PREFILL
    return isinstance(event, ErrorEvent)
