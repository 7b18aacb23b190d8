"""Continuous batching over paged KV blocks: which tokens each step computes.

Pure bookkeeping: no torch, no asyncio, no clock. A step is `plan = schedule(...)`, one forward
pass of somebody else, `commit(plan, drawn, ...)`. Where the stages of a pipeline compute several
plans at a time, `schedule` is called again before `commit`: a sequence's next prompt chunk may
follow at once, its next token only when the last one is drawn, and what a plan in flight writes to
is neither preempted nor ended.

* Decoding sequences come first, one token each; the rest of the token budget goes to prefill in
  chunks, in order of arrival. Chunk borders inside a prompt are multiples of the block size.
* A sequence is admitted with the blocks of all tokens that it has, so a prompt is never stuck
  half way. Only decoding grows; when no block is left the latest arrival gives its blocks back and
  is computed again later. PREFILL sequences are never preempted: others read their blocks.
* Sequences and reservations that wait for blocks are served in order of arrival. Admission leaves
  one free block for each sequence that decodes, so that it does not preempt at once.
"""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.errors import DuplicateRequestError, IsthmusError, LayoutMismatchError
from engine.request import Request
from engine.runtime.commands import (
    EngineEvent,
    ErrorEvent,
    KvComputedEvent,
    PreemptedEvent,
    Reservation,
    SequenceMode,
    TokenEvent,
)
from engine.scheduling.admission import Admission
from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import EngineLimits
from engine.scheduling.reservations import Reservations
from engine.scheduling.sequence import Sequence, SequenceState
from engine.scheduling.step_plan import DrawnToken, ScheduledChunk, StepPlan

_GROWING_MODES = (SequenceMode.LOCAL, SequenceMode.DECODE)


class Scheduler:
    """Owns every sequence, reservation and block count of one engine."""

    def __init__(
        self,
        limits: EngineLimits,
        *,
        max_num_sequences: int,
        eos_token_ids: frozenset[int],
        has_prefix_cache: bool = True,
        hash_salt_of: Callable[[int], int] = lambda _num_prompt_tokens: 0,
        first_block_id: int = 0,
        max_num_plans: int = 1,
    ) -> None:
        """Put a scheduler together.

        Args:
            limits: of the engine.
            max_num_sequences: in one plan, and running.
            eos_token_ids: end an answer.
            has_prefix_cache: whether full blocks are kept for other sequences.
            hash_salt_of: see `Sequence.hash_salt`; from the number of prompt tokens.
            first_block_id: the blocks' ids count from it.
            max_num_plans: that are in flight at a time; decoding sequences are dealt out to them.
        """
        self.limits = limits
        self.block_pool = BlockPool(limits.num_blocks, first_block_id)
        self._admission = Admission(
            self.block_pool,
            limits,
            has_prefix_cache=has_prefix_cache,
            num_kept_free=lambda: sum(1 for s in self._running if s.mode in _GROWING_MODES),
        )
        self.reservations = Reservations(self._admission, limits)
        self.max_num_sequences = max_num_sequences
        self.eos_token_ids = eos_token_ids
        self.has_prefix_cache = has_prefix_cache
        self.hash_salt_of = hash_salt_of
        self.max_num_plans = max_num_plans
        self.num_preemptions = 0
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self._sequences: dict[str, Sequence] = {}
        self._running: list[Sequence] = []
        self._ready: deque[Sequence] = deque()
        self._waiting: deque[Sequence] = deque()
        self._ended_prefixes: list[tuple[bytes, ...]] = []
        self._untold: list[EngineEvent] = []

    # State that others may look at.

    def sequence(self, request_id: str) -> Sequence:
        return self._sequences[request_id]

    def has_sequence(self, request_id: str) -> bool:
        return request_id in self._sequences

    def is_known(self, request_id: str) -> bool:
        """Whether a sequence or a reservation has this id."""
        return request_id in self._sequences or self.reservations.get(request_id) is not None

    @property
    def num_free_blocks(self) -> int:
        return self.block_pool.num_free

    @property
    def num_blocks(self) -> int:
        return self.block_pool.num_blocks

    def is_in_flight(self, request_id: str) -> bool:
        """Whether a plan that is not committed has tokens of it."""
        sequence = self._sequences.get(request_id)
        return sequence is not None and sequence.is_in_flight

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def num_prefix_hit_tokens(self) -> int:
        """Tokens that those who were admitted did not need to compute, or to be sent."""
        return self._admission.num_prefix_hit_tokens

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._ready)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens not yet computed."""
        waiting = sum(sequence.num_behind for sequence in self._waiting)
        return waiting + sum(s.num_behind for s in self._running if s.num_behind > 1)

    @property
    def is_decoding(self) -> bool:
        """Whether sequences wait for their next token, not for their first."""
        return bool(self._ready) or any(s.has_drawn or _is_one_behind(s) for s in self._running)

    @property
    def min_num_batched_tokens(self) -> int:
        """The smallest step budget with which a full batch decodes and prefill still advances."""
        return self.max_num_sequences + self.limits.block_size_tokens

    def burden(self, num_tokens: int, hashes: Seq[bytes]) -> tuple[bool, int]:
        """What a new sequence would meet here; of several schedulers the least is its best place.

        Returns:
            Whether it must wait for blocks; then the tokens to compute before it is done with its
            own, each sequence that is here counted as one block more: it decodes beside it.
        """
        cached = self._admission.cached_prefix(hashes)
        wanted = self.block_pool.num_taken_by(self.limits.num_blocks_for(num_tokens), cached)
        waiting = [each.num_tokens for each in self._waiting]
        waiting += [each.num_tokens for each in self.reservations.waiting]
        wanted += sum(map(self.limits.num_blocks_for, waiting))
        must_wait = not self._admission.has_room(wanted)
        num_here = len(self._sequences.keys() | set(self.reservations))
        block_size = self.limits.block_size_tokens
        num_new = num_tokens - len(cached) * block_size
        return must_wait, self.num_waiting_tokens + num_new + num_here * block_size

    # What others ask for.

    def submit(self, request: Request, mode: SequenceMode, now_ns: int) -> list[EngineEvent]:
        """Take a request whose limits were checked.

        Raises:
            DuplicateRequestError: the id is here already.
        """
        if request.request_id in self._sequences:
            raise DuplicateRequestError(f"request {request.request_id} is running")
        is_decode = mode is SequenceMode.DECODE
        sequence = Sequence(
            request,
            mode,
            now_ns,
            SequenceState.AWAITING_KV if is_decode else SequenceState.WAITING,
            self._admission.take_ordinal(),
            [*request.prompt_token_ids, *request.output_token_ids],
            self.hash_salt_of(len(request.prompt_token_ids)),
        )
        self._sequences[request.request_id] = sequence
        if not is_decode:
            self._waiting.append(sequence)
            return []
        return self._join(request.request_id)

    def abort(self, request_id: str) -> int:
        """End a sequence and its reservation in any state; returns the blocks freed.

        No plan in flight may have tokens of it.
        """
        num_freed = self.reservations.drop(request_id)
        sequence = self._sequences.get(request_id)
        return num_freed if sequence is None else num_freed + self._end(sequence)

    def release(self, request_id: str) -> int:
        """Free a PREFILL sequence's blocks, in whichever state it is; as with `abort`."""
        sequence = self._sequences.get(request_id)
        if sequence is None or sequence.mode is not SequenceMode.PREFILL:
            return 0
        return self._end(sequence)

    def reserve(self, request_id: str, num_tokens: int, hashes: Seq[bytes]) -> None:
        """Queue a reservation; `grant_reservations` answers it. See `Reservations.reserve`."""
        self.reservations.reserve(request_id, num_tokens, hashes)

    def cancel_reservation(self, request_id: str) -> int:
        """Free a reservation unless its KV is committed; a submitted sequence waits on."""
        reservation = self.reservations.get(request_id)
        if reservation is None or reservation.is_committed:
            return 0
        return self.reservations.drop(request_id)

    def commit_reservation(
        self, request_id: str, first_token_id: int, now_ns: int
    ) -> list[EngineEvent]:
        """The reserved blocks hold their KV; the sequence joins the next step once submitted.

        Raises:
            UnknownRequestError: no granted, uncommitted reservation has this id.
        """
        self.reservations.commit(request_id, first_token_id, now_ns)
        return self._join(request_id)

    # Prefixes that others read or write while no sequence of ours needs them.

    def num_cached_blocks(self, hashes: Seq[bytes]) -> int:
        """Leading `hashes` whose blocks are cached; any thread may ask."""
        return len(self.block_pool.cached_prefix(hashes))

    def hold_prefix(self, hold_id: str, hashes: Seq[bytes]) -> Reservation:
        """Keep the cached blocks of leading `hashes` unchanged until `cancel_reservation`.

        Raises as `Reservations.hold`.
        """
        cached = self.block_pool.cached_prefix(hashes)
        return self.reservations.hold(hold_id, hashes[: len(cached)], cached)

    def take_prefix(self, hold_id: str, hashes: Seq[bytes]) -> Reservation:
        """Take a block for each of `hashes` now: the cached ones, then ones to be written.

        They stay until `adopt_prefix` or `cancel_reservation`. It waits for nobody, and raises as
        `hold_prefix`.
        """
        return self.reservations.hold(hold_id, hashes, self.block_pool.cached_prefix(hashes))

    def adopt_prefix(self, hold_id: str, num_blocks: int) -> None:
        """The first `num_blocks` of `take_prefix` hold their KV. See `Reservations.adopt`."""
        self.reservations.adopt(hold_id, num_blocks)

    def take_ended_prefixes(self) -> list[tuple[bytes, ...]]:
        """Hashes of the full blocks of sequences that ended since the last call, each in order."""
        ended, self._ended_prefixes = self._ended_prefixes, []
        return ended

    def grant_reservations(self) -> list[tuple[str, Reservation]]:
        """Give blocks to waiting reservations, unless an older sequence waits for blocks too."""
        oldest = self._waiting[0].ordinal if self._waiting else None
        return list(self.reservations.granted_before(oldest))

    # Steps.

    def schedule(
        self, max_num_batched_tokens: int, now_ns: int
    ) -> tuple[StepPlan, list[tuple[str, Reservation]]]:
        """Plan the next step; an empty plan means that nothing can run until something changes.

        Tokens in the plan are in flight until `commit`.

        Args:
            max_num_batched_tokens: bound on the step's tokens, at least `min_num_batched_tokens`.
            now_ns: marks the first step of each sequence.

        Returns:
            The plan, and the reservations granted on the way.
        """
        assert max_num_batched_tokens >= self.min_num_batched_tokens, "prefill would starve"
        while self._ready and len(self._running) < self.max_num_sequences:
            self._run(self._ready.popleft())
        chunks = self._plan_decode()
        budget = max_num_batched_tokens - len(chunks)
        for sequence in self._running:
            if sequence.num_behind > 1 and budget > 0:
                budget -= self._plan_prefill(sequence, budget, chunks)
        granted: list[tuple[str, Reservation]] = []
        while self._waiting and len(self._running) < self.max_num_sequences and budget > 0:
            sequence = self._waiting[0]
            granted += self.reservations.granted_before(sequence.ordinal)
            if not self._admit(sequence):
                break
            self._waiting.popleft()
            self._run(sequence)
            budget -= self._plan_prefill(sequence, budget, chunks)
        else:  # what waits now waits for a place in the batch, not for blocks
            granted += self.reservations.granted_before(None)
        for chunk in chunks:
            scheduled = self._sequences[chunk.request_id]
            scheduled.num_planned_tokens += len(chunk.token_ids)
            if scheduled.scheduled_ns is None:
                scheduled.scheduled_ns = now_ns
        return StepPlan(tuple(chunks)), granted

    def commit(self, plan: StepPlan, drawn: Seq[DrawnToken], now_ns: int) -> list[EngineEvent]:
        """Book a computed step.

        Args:
            plan: the earliest of what `schedule` answered that is not committed.
            drawn: one for each drawing chunk, in their order.
            now_ns: when the step's results were there.
        """
        events, self._untold = self._untold, []
        remaining = iter(drawn)
        for chunk in plan.chunks:
            sequence = self._sequences[chunk.request_id]
            num_new = len(chunk.token_ids)
            if chunk.first_position < sequence.num_given_tokens or num_new > 1:
                self.num_prefill_tokens += num_new
            else:
                self.num_decode_tokens += 1
            sequence.num_computed_tokens += num_new
            self._register_full_blocks(sequence)
            if sequence.mode is SequenceMode.PREFILL:
                events.append(self._announce(sequence))
            if chunk.is_drawing:
                events.append(self._append(sequence, next(remaining), now_ns))
        return events

    def check_conservation(self) -> None:
        """Assert that sequences and reservations hold exactly the blocks that are held."""
        self.block_pool.check_conservation()
        held = self.reservations.block_ids
        for sequence in self._sequences.values():
            held.update(sequence.block_ids)
        num_held = self.block_pool.num_blocks - self.block_pool.num_free
        assert len(held) == num_held, f"{num_held} blocks held, owners know {len(held)}"

    # Planning.

    def _plan_decode(self) -> list[ScheduledChunk]:
        """One token of each sequence that is one behind, preempting the latest for blocks.

        Plans in flight share the sequences evenly.
        """
        num_decoding = sum(1 for sequence in self._running if _is_one_behind(sequence))
        most = -(-num_decoding // self.max_num_plans)
        return [
            self._chunk(sequence, 1)
            for sequence in [s for s in self._running if s.num_behind == 1][:most]
            if sequence.state is SequenceState.RUNNING and self._grow(sequence)
        ]

    def _grow(self, sequence: Sequence) -> bool:
        """Make room for the KV of the newest token; False when `sequence` had to give way.

        Where a later arrival is in flight, `sequence` keeps its blocks and waits for a later plan.
        """
        if self.limits.num_blocks_for(sequence.num_tokens) <= len(sequence.block_ids):
            return True
        while self.block_pool.num_free == 0:
            latest = [s for s in reversed(self._running) if s.mode in _GROWING_MODES]
            victim = next(s for s in latest if not s.is_in_flight)
            if victim is sequence and victim is not latest[0]:
                return False
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_ids += self.block_pool.allocate(1)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Take all blocks back; the sequence stands first among those that wait."""
        self.num_preemptions += 1
        self._untold.append(PreemptedEvent(sequence.request_id))
        self._running.remove(sequence)
        self.block_pool.release(sequence.block_ids)
        sequence.block_ids = []
        sequence.begin_at(0)
        sequence.num_registered_blocks = 0
        sequence.is_prefilled_locally = True
        sequence.move_to(SequenceState.WAITING)
        self._waiting.appendleft(sequence)

    def _plan_prefill(self, sequence: Sequence, budget: int, chunks: list[ScheduledChunk]) -> int:
        """Add the next chunk of at most `budget` tokens; returns its length, which may be 0."""
        num_new = min(budget, sequence.num_behind)
        if num_new < sequence.num_behind:
            end = sequence.num_planned_tokens + num_new
            num_new -= end % self.limits.block_size_tokens
        if num_new > 0:
            chunks.append(self._chunk(sequence, num_new))
        return max(num_new, 0)

    def _chunk(self, sequence: Sequence, num_new: int) -> ScheduledChunk:
        start = sequence.num_planned_tokens
        return ScheduledChunk(
            sequence.request_id,
            start,
            tuple(sequence.token_ids[start : start + num_new]),
            tuple(sequence.block_ids),
            len(sequence.request.prompt_token_ids),
            is_drawing=num_new == sequence.num_behind,
        )

    # Admission.

    def _admit(self, sequence: Sequence) -> bool:
        """Give a waiting sequence its blocks; at least its last token stays to be computed."""
        hashes = sequence.hashes_of_full_blocks(self.limits.block_size_tokens)
        usable = hashes[: (sequence.num_tokens - 1) // self.limits.block_size_tokens]
        allocated = self._admission.allocate(sequence.num_tokens, usable)
        if allocated is None:
            return False
        sequence.block_ids, num_cached_tokens = allocated
        sequence.begin_at(num_cached_tokens)
        sequence.num_registered_blocks = (
            sequence.num_computed_tokens // self.limits.block_size_tokens
        )
        if not sequence.has_drawn:
            sequence.num_cached_tokens = sequence.num_computed_tokens
        return True

    def _run(self, sequence: Sequence) -> None:
        sequence.move_to(SequenceState.RUNNING)
        self._running.append(sequence)

    def _join(self, request_id: str) -> list[EngineEvent]:
        """Make a submitted sequence ready if its KV is committed; either may come first."""
        sequence = self._sequences.get(request_id)
        reservation = self.reservations.get(request_id)
        if sequence is None or sequence.state is not SequenceState.AWAITING_KV:
            return []
        if reservation is None or reservation.first_token_id is None:
            return []
        hashes = sequence.hashes_of_full_blocks(self.limits.block_size_tokens)
        if reservation.num_tokens != sequence.num_tokens or (
            reservation.hashes != hashes[: len(reservation.hashes)]
        ):
            self.abort(request_id)
            error: IsthmusError = LayoutMismatchError(
                f"request {request_id}: KV of {reservation.num_tokens} tokens was handed over for "
                f"{sequence.num_tokens} tokens, or of other tokens"
            )
            return [ErrorEvent(request_id, error)]
        self.reservations.hand_on(request_id)
        sequence.block_ids = reservation.block_ids
        sequence.begin_at(sequence.num_tokens)
        sequence.num_cached_tokens = reservation.num_cached_tokens
        sequence.is_prefilled_locally = False
        sequence.arrived_ns = reservation.committed_ns
        self._register_full_blocks(sequence)
        sequence.token_ids.append(reservation.first_token_id)
        sequence.move_to(SequenceState.READY)
        self._ready.append(sequence)
        return []

    # Results.

    def _register_full_blocks(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed_tokens // self.limits.block_size_tokens
        if not self.has_prefix_cache or num_full == sequence.num_registered_blocks:
            return
        hashes = sequence.hashes_of_full_blocks(self.limits.block_size_tokens)
        for index in range(sequence.num_registered_blocks, num_full):
            self.block_pool.register(sequence.block_ids[index], hashes[index])
        sequence.num_registered_blocks = num_full

    def announce_step(self, plan: StepPlan, step: int) -> list[KvComputedEvent]:
        """A plan's chunks are going to be computed; for those whose KV is handed over."""
        events = []
        for chunk in plan.chunks:
            sequence = self._sequences.get(chunk.request_id)  # a warm-up has plans of its own
            if sequence is not None and sequence.mode is SequenceMode.PREFILL:
                first = sequence.num_announced_tokens
                num_tokens = chunk.first_position + len(chunk.token_ids) - first
                events.append(
                    KvComputedEvent(
                        chunk.request_id, tuple(sequence.block_ids), first, num_tokens, step
                    )
                )
        return events

    def _announce(self, sequence: Sequence) -> KvComputedEvent:
        first = sequence.num_announced_tokens
        sequence.num_announced_tokens = sequence.num_computed_tokens
        return KvComputedEvent(
            sequence.request_id,
            tuple(sequence.block_ids),
            first,
            sequence.num_computed_tokens - first,
        )

    def _append(self, sequence: Sequence, drawn: DrawnToken, now_ns: int) -> TokenEvent:
        """Book a drawn token; a finished sequence gives its blocks back, PREFILL holds them."""
        sequence.token_ids.append(drawn.token_id)
        finish_reason = sequence.finish_reason(self.eos_token_ids, self.limits.max_context_tokens)
        first = None if sequence.has_drawn else sequence.first_timing(now_ns)
        sequence.has_drawn = True
        if sequence.mode is SequenceMode.PREFILL:
            self._running.remove(sequence)
            sequence.move_to(SequenceState.HELD)
        elif finish_reason is not None:
            self._end(sequence)
        return TokenEvent(sequence.request_id, drawn.token_id, drawn.logprobs, finish_reason, first)

    # Ends.

    def _end(self, sequence: Sequence) -> int:
        """Forget a sequence; returns the blocks freed."""
        assert not sequence.is_in_flight, f"{sequence.request_id} is being computed"
        del self._sequences[sequence.request_id]
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
        elif sequence.state is SequenceState.WAITING:
            self._waiting.remove(sequence)
        elif sequence.state is SequenceState.READY:
            self._ready.remove(sequence)
        sequence.move_to(SequenceState.FINISHED)
        if sequence.num_registered_blocks:
            hashes = sequence.block_hashes[: sequence.num_registered_blocks]
            self._ended_prefixes.append(tuple(hashes))
        num_freed = self.block_pool.release(sequence.block_ids)
        sequence.block_ids = []
        return num_freed


def _is_one_behind(sequence: Sequence) -> bool:
    """Whether its next token needs one more only, which may be in flight."""
    return sequence.num_tokens - sequence.num_computed_tokens == 1
