"""One engine: a scheduler and what computes its plans. Synchronous, one thread; no torch here."""

import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from engine.errors import IsthmusError
from engine.request import Request
from engine.runtime.commands import EngineEvent, EngineStats, ErrorEvent, Reservation, SequenceMode
from engine.runtime.core_share import CoreGrant, CoreShare
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.sharded_scheduler import ShardedScheduler
from engine.scheduling.step_plan import DrawnToken, StepPlan

# Commands: loop -> engine thread. Each is answered by one Reply with its number.


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request
    mode: SequenceMode


@dataclass(frozen=True, slots=True)
class Abort:
    request_id: str


@dataclass(frozen=True, slots=True)
class Release:
    request_id: str


@dataclass(frozen=True, slots=True)
class Reserve:
    request_id: str
    num_tokens: int
    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class CommitReservation:
    request_id: str
    first_token_id: int


@dataclass(frozen=True, slots=True)
class CancelReservation:
    request_id: str


@dataclass(frozen=True, slots=True)
class HoldPrefix:
    hold_id: str
    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class TakePrefix:
    hold_id: str
    block_hashes: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class AdoptPrefix:
    hold_id: str
    num_blocks: int


Command = (
    Submit
    | Abort
    | Release
    | Reserve
    | CommitReservation
    | CancelReservation
    | HoldPrefix
    | TakePrefix
    | AdoptPrefix
)


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers one command: freed blocks, a reservation, None, or why not."""

    command_id: int
    result: int | Reservation | IsthmusError | None


@dataclass(frozen=True, slots=True)
class PrefixEnded:
    """A sequence has ended; these full blocks of it, in order, were cached then."""

    block_hashes: tuple[bytes, ...]


EngineOutput = EngineEvent | Reply | PrefixEnded


class StepEngine(Protocol):
    """What an EngineThread drives. Not thread-safe; an exception from it is the engine's death."""

    limits: EngineLimits

    @property
    def stats(self) -> EngineStats: ...

    def num_cached_blocks(self, block_hashes: Seq[bytes]) -> int:
        """Leading `block_hashes` that are cached at this moment; any thread may ask."""

    def prepare(self) -> None:
        """Called first, on the thread that steps: warm up, so that no request pays for it."""

    def apply(self, command_id: int, command: Command) -> list[EngineOutput]:
        """Carry out a command between two steps; a Reserve may be answered later."""

    def step(self) -> list[EngineOutput] | None:
        """Compute one step; None when nothing can run until another command comes."""

    def rest(self) -> None:
        """Called when the engine is going to wait: others may use its cores."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Called before `prepare`.

        `on_failure` may be called once, from any thread, when the engine has become unable to go
        on while no step runs: another rank's process is gone.
        """

    def report_to(self, deliver: Callable[[list[EngineOutput]], None]) -> None:
        """Called before `prepare`; `deliver` gets outputs of steps that are still computed."""

    def close(self) -> None:
        """Free what it holds; nothing is called afterwards."""


class PlanExecutor(Protocol):
    """Computes plans; `ModelExecutor` does it on a model, tests without one."""

    def warm_up(self, num_threads: int) -> None:
        """Compute something like the steps to come, so that no request pays for it."""

    @property
    def max_num_plans(self) -> int:
        """How many may have begun and not be finished; more than 1 where stages compute them."""

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        """Start to compute a plan of at least one chunk; may return before it is computed.

        Args:
            plan: see `Scheduler.schedule`.
            num_threads: CPU threads that it may use.
        """

    def finish(self, drawing: Seq[Sequence]) -> list[DrawnToken]:
        """Wait until the earliest plan's KV is there, draw a token for each drawing chunk.

        Args:
            drawing: the sequences of the drawing chunks, in their order.
        """

    def tell(self) -> None:
        """Wake those who wait for KV of plans that are finished; their tokens are out by now."""

    def forget(self, request_id: str) -> None:
        """Drop what is remembered of a sequence that has ended; unknown ids are fine."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """As `StepEngine.watch`."""

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        """Have `on_step(plan, step)` called in `begin`, before anything of the plan is computed.

        `step` is its number in `KvProgress`; the answer, whether somebody waits for its layers.
        Only where it can be told what is written (host memory), and for plans of so much KV that it
        is worth a message.
        """

    def close(self) -> None:
        """Free what it holds."""


Executor = TypeVar("Executor", bound=PlanExecutor)


class Engine(Generic[Executor]):
    """Implements StepEngine."""

    def __init__(
        self,
        scheduler: Scheduler | ShardedScheduler,
        executor: Executor,
        cores: CoreShare,
        *,
        max_num_batched_tokens: int,
        shared_step_tokens_per_thread: int | None = None,
    ) -> None:
        """Put an engine together; `build_engine` does it for a model on disk.

        Args:
            scheduler: everything it decides is computed by `executor`.
            executor: closed with the engine.
            cores: closed with the engine.
            max_num_batched_tokens: of one step, of each data shard.
            shared_step_tokens_per_thread: see `EngineConfig`; None sets no further bound.
        """
        self.limits = scheduler.limits
        self.scheduler = scheduler
        self.executor = executor
        self._cores = cores
        self._max_num_batched_tokens = max_num_batched_tokens
        self._shared_step_tokens_per_thread = shared_step_tokens_per_thread
        self._reserving: dict[str, int] = {}
        self._in_flight: deque[StepPlan] = deque()
        self._num_steps = 0
        self._step_s_total = 0.0
        self._prefill_s_total = 0.0
        self._stats = self._snapshot()

    @property
    def stats(self) -> EngineStats:
        return self._stats

    def num_cached_blocks(self, block_hashes: Seq[bytes]) -> int:
        return self.scheduler.num_cached_blocks(block_hashes)

    def prepare(self) -> None:
        self.executor.warm_up(self._cores.most_threads)
        self._cores.settle()

    def apply(self, command_id: int, command: Command) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        try:
            outputs += self._carry_out(command_id, command)
        except IsthmusError as error:
            outputs.append(Reply(command_id, error))
        outputs += self._replies_to(self.scheduler.grant_reservations())
        outputs += self._ended_prefixes()
        self._stats = self._snapshot()
        return outputs

    def step(self) -> list[EngineOutput] | None:
        """Begin as many plans as may be in flight, then finish the earliest."""
        self.executor.tell()
        begin_s = time.perf_counter()
        outputs: list[EngineOutput] = []
        while len(self._in_flight) < self.executor.max_num_plans:
            grant = self._cores.begin_step()
            plan, granted = self.scheduler.schedule(self._budget(grant), time.time_ns())
            outputs += self._replies_to(granted)
            if not plan.chunks:
                break
            self.executor.begin(plan, grant.num_threads)
            self._in_flight.append(plan)
        if not self._in_flight:
            self._stats = self._snapshot()
            return outputs or None
        num_tokens = self._in_flight[0].num_tokens
        num_prefill_tokens = self.scheduler.num_prefill_tokens
        outputs += self._finish_earliest()
        step_s = time.perf_counter() - begin_s
        self._step_s_total += step_s
        num_prefill_tokens = self.scheduler.num_prefill_tokens - num_prefill_tokens
        self._prefill_s_total += step_s * num_prefill_tokens / num_tokens
        self._stats = self._snapshot()
        return outputs

    def rest(self) -> None:
        self._cores.rest()

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        self.executor.watch(on_failure)

    def report_to(self, deliver: Callable[[list[EngineOutput]], None]) -> None:
        def on_step(plan: StepPlan, step: int) -> bool:
            events = self.scheduler.announce_step(plan, step)
            if events:
                deliver([*events])
            return bool(events)

        self.executor.watch_steps(on_step)

    def close(self) -> None:
        self._cores.close()
        self.executor.close()

    def _finish_earliest(self) -> list[EngineOutput]:
        plan = self._in_flight.popleft()
        drawing = [
            self.scheduler.sequence(chunk.request_id) for chunk in plan.chunks if chunk.is_drawing
        ]
        drawn = self.executor.finish(drawing)
        events = self.scheduler.commit(plan, drawn, time.time_ns())
        for sequence in drawing:
            if sequence.state is SequenceState.FINISHED:
                self.executor.forget(sequence.request_id)
        self._num_steps += 1
        return [*self._ended_prefixes(), *events]

    def _land(self, request_id: str) -> list[EngineOutput]:
        """Finish plans until none has tokens of a sequence that is to end."""
        outputs: list[EngineOutput] = []
        while self.scheduler.is_in_flight(request_id):
            outputs += self._finish_earliest()
        return outputs

    def _budget(self, grant: CoreGrant) -> int:
        """Tokens of the next step: few enough that whoever waits for its end waits shortly."""
        per_thread = self._shared_step_tokens_per_thread
        if per_thread is None or not (grant.is_borrowing or self.scheduler.is_decoding):
            return self._max_num_batched_tokens
        shared = max(per_thread * grant.num_threads, self.scheduler.min_num_batched_tokens)
        return min(shared, self._max_num_batched_tokens)

    def _carry_out(self, command_id: int, command: Command) -> list[EngineOutput]:
        scheduler, now_ns = self.scheduler, time.time_ns()
        match command:
            case Submit(request, mode):
                try:
                    return [*scheduler.submit(request, mode, now_ns)]
                except IsthmusError as error:
                    return [ErrorEvent(request.request_id, error)]
            case Abort(request_id):
                outputs = [*self._give_up_reserving(request_id), *self._land(request_id)]
                self.executor.forget(request_id)
                return [*outputs, Reply(command_id, scheduler.abort(request_id))]
            case Release(request_id):
                outputs = self._land(request_id)
                self.executor.forget(request_id)
                return [*outputs, Reply(command_id, scheduler.release(request_id))]
            case Reserve(request_id, num_tokens, block_hashes):
                scheduler.reserve(request_id, num_tokens, block_hashes)
                self._reserving[request_id] = command_id
                return []
            case CommitReservation(request_id, first_token_id):
                events = scheduler.commit_reservation(request_id, first_token_id, now_ns)
                return [Reply(command_id, None), *events]
            case CancelReservation(request_id):
                outputs = self._give_up_reserving(request_id)
                return [*outputs, Reply(command_id, scheduler.cancel_reservation(request_id))]
            case HoldPrefix(hold_id, block_hashes):
                return [Reply(command_id, scheduler.hold_prefix(hold_id, block_hashes))]
            case TakePrefix(hold_id, block_hashes):
                return [Reply(command_id, scheduler.take_prefix(hold_id, block_hashes))]
            case AdoptPrefix(hold_id, num_blocks):
                scheduler.adopt_prefix(hold_id, num_blocks)
                return [Reply(command_id, None)]

    def _give_up_reserving(self, request_id: str) -> list[EngineOutput]:
        """Answer a Reserve that will never be granted now."""
        command_id = self._reserving.pop(request_id, None)
        return [] if command_id is None else [Reply(command_id, None)]

    def _replies_to(self, granted: list[tuple[str, Reservation]]) -> list[EngineOutput]:
        return [
            Reply(self._reserving.pop(request_id), reservation)
            for request_id, reservation in granted
        ]

    def _ended_prefixes(self) -> list[PrefixEnded]:
        return [PrefixEnded(hashes) for hashes in self.scheduler.take_ended_prefixes()]

    def _snapshot(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=scheduler.num_free_blocks,
            num_blocks=scheduler.num_blocks,
            num_prefill_tokens=scheduler.num_prefill_tokens,
            num_decode_tokens=scheduler.num_decode_tokens,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            step_s_total=self._step_s_total,
            prefill_s_total=self._prefill_s_total,
        )
