"""A RequestEngine without torch: tokens are a function of the tokens before them.

It obeys the contract of `engine.runtime.commands.RequestEngine`, with the real block pool and
prefix cache, and steps on the event loop. Test hooks: `stall`, `resume`, `crash`.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from engine.errors import (
    CapacityError,
    DuplicateRequestError,
    EngineDeadError,
    InvalidRequestError,
    UnknownRequestError,
)
from engine.request import FinishReason, Request, TokenLogprobs
from engine.runtime.commands import (
    EngineEvent,
    EngineStats,
    ErrorEvent,
    EventSink,
    FirstTokenTiming,
    KvComputedEvent,
    Reservation,
    SequenceMode,
    TokenEvent,
)
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.block_pool import BlockPool

VOCAB_SIZE = 1000


def next_token(token_ids: Sequence[int]) -> int:
    """The token that a FakeEngine draws after `token_ids`, on whichever engine."""
    return (sum(token_ids) * 31 + len(token_ids) * 7 + 11) % VOCAB_SIZE


def expected_tokens(prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """The first `num_tokens` of the answer to a prompt."""
    token_ids = list(prompt_token_ids)
    for _ in range(num_tokens):
        token_ids.append(next_token(token_ids))
    return token_ids[len(prompt_token_ids) :]


class ListSink:
    """Keeps events and lets a test wait for them."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.batches: list[list[EngineEvent]] = []
        self._changed = asyncio.Event()

    def put(self, events: Sequence[EngineEvent]) -> None:
        self.events.extend(events)
        self.batches.append(list(events))
        self._changed.set()

    def tokens(self, request_id: str) -> list[int]:
        return [
            event.token_id
            for event in self.events
            if isinstance(event, TokenEvent) and event.request_id == request_id
        ]

    def is_over(self, request_id: str) -> bool:
        return any(
            event.request_id == request_id
            and (
                isinstance(event, ErrorEvent)
                or (isinstance(event, TokenEvent) and event.finish_reason is not None)
            )
            for event in self.events
        )

    async def wait_for_tokens(self, request_id: str, num_tokens: int) -> list[int]:
        while len(self.tokens(request_id)) < num_tokens and not self.is_over(request_id):
            self._changed.clear()
            await self._changed.wait()
        return self.tokens(request_id)

    async def wait_until_over(self, request_id: str) -> list[int]:
        while not self.is_over(request_id):
            self._changed.clear()
            await self._changed.wait()
        return self.tokens(request_id)


@dataclass(slots=True)
class _FakeSequence:
    request: Request
    mode: SequenceMode
    sink: EventSink
    token_ids: list[int]
    arrived_ns: int
    block_ids: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int = 0
    is_running: bool = False
    has_drawn: bool = False

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_outputs(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)


@dataclass(slots=True)
class _FakeReservation:
    num_tokens: int
    hashes: list[bytes]
    granted: "asyncio.Future[Reservation]"
    block_ids: list[int] = field(default_factory=list)
    num_cached: int = 0
    first_token_id: int | None = None


class FakeEngine:
    """Implements RequestEngine; also an async context manager like EngineThread."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        block_size_tokens: int = 16,
        max_context_tokens: int = 4096,
        chunk_tokens: int = 32,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        self.block_pool = BlockPool(num_blocks)
        self.block_size_tokens = block_size_tokens
        self.max_context_tokens = max_context_tokens
        self.chunk_tokens = chunk_tokens
        self.eos_token_ids = eos_token_ids
        self.dead = asyncio.Event()
        self.submitted: list[tuple[str, SequenceMode]] = []
        self.aborted: list[str] = []
        self.released: list[str] = []
        self.committed: list[tuple[str, int]] = []
        self._sequences: dict[str, _FakeSequence] = {}
        self._reservations: dict[str, _FakeReservation] = {}
        self._waiting_reservations: deque[str] = deque()
        self._is_stalled = False
        self._is_step_due = False
        self._num_prefill_tokens = 0
        self._num_decode_tokens = 0
        self._num_prefix_hit_tokens = 0
        self._num_steps = 0

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._is_stalled = True

    # Hooks for tests.

    def stall(self) -> None:
        """Stop stepping: nothing is drawn and no reservation is granted, calls still answer."""
        self._is_stalled = True

    def resume(self) -> None:
        self._is_stalled = False
        self._wake()

    def crash(self) -> None:
        """Die as an engine thread does: every sink and every waiter gets an EngineDeadError."""
        self.dead.set()
        error = EngineDeadError("the engine thread died")
        for sequence in self._sequences.values():
            sequence.sink.put([ErrorEvent(sequence.request_id, error)])
        for reservation in self._reservations.values():
            if not reservation.granted.done():
                reservation.granted.set_exception(error)
        self._sequences.clear()
        self._reservations.clear()

    # RequestEngine.

    @property
    def stats(self) -> EngineStats:
        sequences = self._sequences.values()
        waiting = [sequence for sequence in sequences if not sequence.is_running]
        return EngineStats(
            num_waiting=len(waiting),
            num_running=len(sequences) - len(waiting),
            num_waiting_tokens=sum(len(s.token_ids) - s.num_computed for s in waiting),
            num_free_blocks=self.block_pool.num_free,
            num_blocks=self.block_pool.num_blocks,
            num_prefill_tokens=self._num_prefill_tokens,
            num_decode_tokens=self._num_decode_tokens,
            num_steps=self._num_steps,
            num_prefix_hit_tokens=self._num_prefix_hit_tokens,
        )

    def submit(self, request: Request, mode: SequenceMode, sink: EventSink) -> None:
        self._check_alive()
        if request.request_id in self._sequences:
            raise DuplicateRequestError(f"request {request.request_id} is running")
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        if len(request.prompt_token_ids) + request.sampling.max_tokens > self.max_context_tokens:
            raise InvalidRequestError("prompt and max_tokens exceed the context")
        if self._num_blocks_for(len(token_ids)) > self.block_pool.num_blocks:
            raise InvalidRequestError("the prompt exceeds the KV pool")
        sequence = _FakeSequence(request, mode, sink, token_ids, time.time_ns())
        self._sequences[request.request_id] = sequence
        self.submitted.append((request.request_id, mode))
        self._wake()

    async def abort(self, request_id: str) -> int:
        self._check_alive()
        self.aborted.append(request_id)
        num_freed = self._end(request_id)
        num_freed += self._drop_reservation(request_id)
        await asyncio.sleep(0)
        return num_freed

    async def release(self, request_id: str) -> int:
        self._check_alive()
        self.released.append(request_id)
        await asyncio.sleep(0)
        return self._end(request_id)

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        self._check_alive()
        if request_id in self._reservations:
            raise DuplicateRequestError(f"request {request_id} has a reservation")
        if self._num_blocks_for(num_tokens) > self.block_pool.num_blocks:
            raise CapacityError(f"{num_tokens} tokens never fit this pool")
        granted: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        self._reservations[request_id] = _FakeReservation(num_tokens, list(block_hashes), granted)
        self._waiting_reservations.append(request_id)
        self._wake()
        try:
            return await granted
        except asyncio.CancelledError:
            self._drop_reservation(request_id)
            raise

    async def commit(self, request_id: str, first_token_id: int) -> None:
        self._check_alive()
        await asyncio.sleep(0)
        reservation = self._reservations.get(request_id)
        if (
            reservation is None
            or not reservation.block_ids
            or reservation.first_token_id is not None
        ):
            raise UnknownRequestError(f"nothing is reserved for request {request_id}")
        reservation.first_token_id = first_token_id
        self.committed.append((request_id, first_token_id))
        self._wake()

    async def cancel_reservation(self, request_id: str) -> int:
        self._check_alive()
        await asyncio.sleep(0)
        reservation = self._reservations.get(request_id)
        if reservation is None or reservation.first_token_id is not None:
            return 0
        return self._drop_reservation(request_id)

    # Stepping.

    def _wake(self) -> None:
        if not self._is_step_due and not self._is_stalled and not self.dead.is_set():
            self._is_step_due = True
            asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._is_step_due = False
        if self._is_stalled or self.dead.is_set():
            return
        self._num_steps += 1
        self._grant_reservations()
        self._admit()
        events: dict[int, tuple[EventSink, list[EngineEvent]]] = {}
        running = [s for s in self._sequences.values() if s.is_running]
        for sequence in running:
            for event in self._advance(sequence):
                events.setdefault(id(sequence.sink), (sequence.sink, []))[1].append(event)
        for sink, batch in events.values():
            sink.put(batch)
        if running:
            self._wake()

    def _grant_reservations(self) -> None:
        while self._waiting_reservations:
            reservation = self._reservations[self._waiting_reservations[0]]
            cached = self.block_pool.cached_prefix(reservation.hashes)
            try:
                reservation.block_ids = self.block_pool.allocate(
                    self._num_blocks_for(reservation.num_tokens), cached
                )
            except CapacityError:
                return
            self._waiting_reservations.popleft()
            reservation.num_cached = len(cached) * self.block_size_tokens
            reservation.granted.set_result(
                Reservation(tuple(reservation.block_ids), reservation.num_cached)
            )

    def _admit(self) -> None:
        for sequence in self._sequences.values():
            if sequence.is_running or sequence.has_drawn:
                continue
            if sequence.mode is SequenceMode.DECODE:
                self._join(sequence)
                continue
            hashes = block_hashes(sequence.token_ids[:-1], self.block_size_tokens)
            cached = self.block_pool.cached_prefix(hashes)
            try:
                sequence.block_ids = self.block_pool.allocate(
                    self._num_blocks_for(len(sequence.token_ids)), cached
                )
            except CapacityError:
                return
            sequence.num_cached = len(cached) * self.block_size_tokens
            self._num_prefix_hit_tokens += sequence.num_cached
            sequence.is_running = True

    def _join(self, sequence: _FakeSequence) -> None:
        reservation = self._reservations.get(sequence.request_id)
        if reservation is None or reservation.first_token_id is None:
            return
        del self._reservations[sequence.request_id]
        sequence.block_ids = reservation.block_ids
        sequence.num_computed = len(sequence.token_ids)
        sequence.num_cached = reservation.num_cached
        self._register_blocks(sequence)
        sequence.token_ids.append(reservation.first_token_id)
        sequence.is_running = True

    def _advance(self, sequence: _FakeSequence) -> list[EngineEvent]:
        is_decode = sequence.has_drawn or sequence.mode is SequenceMode.DECODE
        if is_decode:
            sequence.num_computed = len(sequence.token_ids)
            self._num_decode_tokens += 1
            return [self._draw(sequence)]
        start = sequence.num_computed
        end = min(max(start, sequence.num_cached) + self.chunk_tokens, len(sequence.token_ids))
        self._num_prefill_tokens += end - max(start, sequence.num_cached)
        sequence.num_computed = end
        self._register_blocks(sequence)
        events: list[EngineEvent] = []
        if sequence.mode is SequenceMode.PREFILL:
            block_ids = tuple(sequence.block_ids)
            events.append(KvComputedEvent(sequence.request_id, block_ids, start, end - start))
        if end == len(sequence.token_ids):
            events.append(self._draw(sequence))
        return events

    def _draw(self, sequence: _FakeSequence) -> TokenEvent:
        token_id = next_token(sequence.token_ids)
        sequence.token_ids.append(token_id)
        sampling = sequence.request.sampling
        first = None
        if not sequence.has_drawn:
            now_ns = time.time_ns()
            first = FirstTokenTiming(
                sequence.arrived_ns,
                now_ns,
                now_ns,
                sequence.num_cached,
                prefilled_locally=sequence.mode is not SequenceMode.DECODE,
            )
        sequence.has_drawn = True
        ends = token_id in sampling.stop_token_ids or (
            token_id in self.eos_token_ids and not sampling.ignore_eos
        )
        finish_reason = None
        if ends and sequence.num_outputs > sampling.min_tokens:
            finish_reason = FinishReason.STOP
        elif sequence.num_outputs >= sampling.max_tokens:
            finish_reason = FinishReason.LENGTH
        logprobs = None
        if sampling.num_top_logprobs is not None:
            logprobs = TokenLogprobs(-0.5, ((token_id, -0.5),) * min(1, sampling.num_top_logprobs))
        if sequence.mode is SequenceMode.PREFILL:
            sequence.is_running = False  # holds its blocks until it is released
        elif finish_reason is not None:
            self._end(sequence.request_id)
        return TokenEvent(sequence.request_id, token_id, logprobs, finish_reason, first)

    def _register_blocks(self, sequence: _FakeSequence) -> None:
        hashes = block_hashes(sequence.token_ids[: sequence.num_computed], self.block_size_tokens)
        for block_id, block_hash in zip(sequence.block_ids, hashes, strict=False):
            self.block_pool.register(block_id, block_hash)

    def _end(self, request_id: str) -> int:
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return 0
        self._wake()
        return self.block_pool.release(sequence.block_ids)

    def _drop_reservation(self, request_id: str) -> int:
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return 0
        if request_id in self._waiting_reservations:
            self._waiting_reservations.remove(request_id)
        if not reservation.granted.done():
            reservation.granted.cancel()
        self._wake()
        return self.block_pool.release(reservation.block_ids)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size_tokens)

    def _check_alive(self) -> None:
        if self.dead.is_set():
            raise EngineDeadError("the engine thread died")
