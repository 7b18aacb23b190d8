"""One engine: scheduler, model runner and sampler. Synchronous; one thread at a time."""

import time
from dataclasses import dataclass
from typing import Protocol

from engine.checkpoint.config import ModelConfig
from engine.errors import IsthmusError
from engine.kv_cache.pool import KvPool
from engine.request import Request
from engine.runtime.commands import EngineEvent, EngineStats, ErrorEvent, Reservation, SequenceMode
from engine.runtime.core_share import CoreShare
from engine.runtime.runner import ModelRunner
from engine.runtime.warm_up import warm_up
from engine.sampling.history import SamplerState
from engine.sampling.sampler import SampleRow, sample
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
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


Command = Submit | Abort | Release | Reserve | CommitReservation | CancelReservation


@dataclass(frozen=True, slots=True)
class Reply:
    """Answers one command: freed blocks, a reservation, None, or why not."""

    command_id: int
    result: int | Reservation | IsthmusError | None


EngineOutput = EngineEvent | Reply


class StepEngine(Protocol):
    """What an EngineThread drives. Not thread-safe; an exception from it is the engine's death."""

    limits: EngineLimits

    @property
    def stats(self) -> EngineStats: ...

    def prepare(self) -> None:
        """Called first, on the thread that steps: warm up, so that no request pays for it."""

    def apply(self, command_id: int, command: Command) -> list[EngineOutput]:
        """Carry out a command between two steps; a Reserve may be answered later."""

    def step(self) -> list[EngineOutput] | None:
        """Compute one step; None when nothing can run until another command comes."""

    def rest(self) -> None:
        """Called when the engine is going to wait: others may use its cores."""

    def close(self) -> None:
        """Free what it holds; nothing is called afterwards."""


class Engine:
    """Implements StepEngine on a real model."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: ModelRunner,
        cores: CoreShare,
        *,
        max_num_batched_tokens: int,
        max_shared_step_tokens: int,
    ) -> None:
        self.limits = scheduler.limits
        self.scheduler = scheduler
        self.runner = runner
        self._cores = cores
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_shared_step_tokens = max_shared_step_tokens
        self._states: dict[str, SamplerState] = {}
        self._reserving: dict[str, int] = {}
        self._num_steps = 0
        self._step_s_total = 0.0
        self._stats = self._snapshot()

    @property
    def stats(self) -> EngineStats:
        return self._stats

    @property
    def kv_pool(self) -> KvPool:
        return self.runner.pool

    @property
    def model_config(self) -> ModelConfig:
        return self.runner.model.config

    def prepare(self) -> None:
        warm_up(
            self.runner,
            max_num_tokens=self._max_num_batched_tokens,
            max_num_sequences=self.scheduler.max_num_sequences,
            max_context_tokens=self.limits.max_context_tokens,
            num_threads=self._cores.most_threads,
        )
        self._cores.settle()

    def apply(self, command_id: int, command: Command) -> list[EngineOutput]:
        outputs: list[EngineOutput] = []
        try:
            outputs += self._carry_out(command_id, command)
        except IsthmusError as error:
            outputs.append(Reply(command_id, error))
        outputs += self._replies_to(self.scheduler.grant_reservations())
        self._stats = self._snapshot()
        return outputs

    def step(self) -> list[EngineOutput] | None:
        begin_s = time.perf_counter()
        grant = self._cores.begin_step()
        budget = self._max_num_batched_tokens
        if grant.is_borrowing:
            budget = self._max_shared_step_tokens
        plan, granted = self.scheduler.schedule(budget, time.time_ns())
        outputs = self._replies_to(granted)
        if not plan.chunks:
            self._stats = self._snapshot()
            return outputs or None
        logits_BV = self.runner.run(plan, grant.num_threads)
        drawn = sample(logits_BV, rows) if (rows := self._sample_rows(plan)) else []
        outputs += self._book(plan, drawn)
        self._num_steps += 1
        self._step_s_total += time.perf_counter() - begin_s
        self._stats = self._snapshot()
        return outputs

    def rest(self) -> None:
        self._cores.rest()

    def close(self) -> None:
        self._cores.close()
        self.runner.pool.close()

    def _carry_out(self, command_id: int, command: Command) -> list[EngineOutput]:
        scheduler, now_ns = self.scheduler, time.time_ns()
        match command:
            case Submit(request, mode):
                try:
                    return [*scheduler.submit(request, mode, now_ns)]
                except IsthmusError as error:
                    return [ErrorEvent(request.request_id, error)]
            case Abort(request_id):
                outputs = self._give_up_reserving(request_id)
                self._states.pop(request_id, None)
                return [*outputs, Reply(command_id, scheduler.abort(request_id))]
            case Release(request_id):
                self._states.pop(request_id, None)
                return [Reply(command_id, scheduler.release(request_id))]
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

    def _give_up_reserving(self, request_id: str) -> list[EngineOutput]:
        """Answer a Reserve that will never be granted now."""
        command_id = self._reserving.pop(request_id, None)
        return [] if command_id is None else [Reply(command_id, None)]

    def _replies_to(self, granted: list[tuple[str, Reservation]]) -> list[EngineOutput]:
        return [
            Reply(self._reserving.pop(request_id), reservation)
            for request_id, reservation in granted
        ]

    def _sample_rows(self, plan: StepPlan) -> list[SampleRow]:
        sequences = [
            self.scheduler.sequence(chunk.request_id) for chunk in plan.chunks if chunk.is_drawing
        ]
        return [
            SampleRow(self._state(sequence), sequence.num_tokens, sequence.num_output_tokens)
            for sequence in sequences
        ]

    def _state(self, sequence: Sequence) -> SamplerState:
        state = self._states.get(sequence.request_id)
        if state is None:
            num_prompt = len(sequence.request.prompt_token_ids)
            state = SamplerState(
                sequence.request.sampling,
                prompt_token_ids=sequence.request.prompt_token_ids,
                output_token_ids=sequence.token_ids[num_prompt:],
                eos_token_ids=self.scheduler.eos_token_ids,
            )
            self._states[sequence.request_id] = state
        return state

    def _book(self, plan: StepPlan, drawn: list[DrawnToken]) -> list[EngineEvent]:
        events = self.scheduler.commit(plan, drawn, time.time_ns())
        for chunk in plan.chunks:
            if chunk.is_drawing and not self.scheduler.has_sequence(chunk.request_id):
                del self._states[chunk.request_id]
        return events

    def _snapshot(self) -> EngineStats:
        scheduler = self.scheduler
        return EngineStats(
            num_waiting=scheduler.num_waiting,
            num_running=scheduler.num_running,
            num_waiting_tokens=scheduler.num_waiting_tokens,
            num_free_blocks=scheduler.block_pool.num_free,
            num_blocks=scheduler.block_pool.num_blocks,
            num_prefill_tokens=scheduler.num_prefill_tokens,
            num_decode_tokens=scheduler.num_decode_tokens,
            num_steps=self._num_steps,
            num_preemptions=scheduler.num_preemptions,
            num_prefix_hit_tokens=scheduler.num_prefix_hit_tokens,
            step_s_total=self._step_s_total,
        )
