"""Requests shared out over data shards, which step together: one scheduler for each.

Pure bookkeeping, as `scheduler`. A request stays on its shard until it ends, and finds there what
the prefix cache has; what follows from that for the choice of the shard is `Scheduler.burden`.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.request import Request
from engine.runtime.commands import EngineEvent, KvComputedEvent, Reservation, SequenceMode
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.data_shard import plans_by_shard
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import DrawnToken, StepPlan


class ShardedScheduler:
    """Does what `Scheduler` does, for `limits.num_data_shards` of them.

    Bounds on sequences and tokens of a step are each shard's own.
    """

    def __init__(
        self,
        limits: EngineLimits,
        *,
        max_num_sequences: int,
        eos_token_ids: frozenset[int],
        has_prefix_cache: bool = True,
        hash_salt_of: Callable[[int], int] = lambda _num_prompt_tokens: 0,
        max_num_plans: int = 1,
    ) -> None:
        self.limits = limits
        self.shards = tuple(
            Scheduler(
                limits,
                max_num_sequences=max_num_sequences,
                eos_token_ids=eos_token_ids,
                has_prefix_cache=has_prefix_cache,
                hash_salt_of=hash_salt_of,
                first_block_id=shard * limits.num_blocks,
                max_num_plans=max_num_plans,
            )
            for shard in range(limits.num_data_shards)
        )
        self._has_prefix_cache = has_prefix_cache
        self._hash_salt_of = hash_salt_of

    def sequence(self, request_id: str) -> Sequence:
        return self._holder(request_id).sequence(request_id)

    def is_in_flight(self, request_id: str) -> bool:
        return self._holder(request_id).is_in_flight(request_id)

    @property
    def num_running(self) -> int:
        return sum(shard.num_running for shard in self.shards)

    @property
    def num_waiting(self) -> int:
        return sum(shard.num_waiting for shard in self.shards)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(shard.num_waiting_tokens for shard in self.shards)

    @property
    def num_free_blocks(self) -> int:
        return sum(shard.num_free_blocks for shard in self.shards)

    @property
    def num_blocks(self) -> int:
        return sum(shard.num_blocks for shard in self.shards)

    @property
    def num_preemptions(self) -> int:
        return sum(shard.num_preemptions for shard in self.shards)

    @property
    def num_prefill_tokens(self) -> int:
        return sum(shard.num_prefill_tokens for shard in self.shards)

    @property
    def num_decode_tokens(self) -> int:
        return sum(shard.num_decode_tokens for shard in self.shards)

    @property
    def num_prefix_hit_tokens(self) -> int:
        return sum(shard.num_prefix_hit_tokens for shard in self.shards)

    @property
    def is_decoding(self) -> bool:
        return any(shard.is_decoding for shard in self.shards)

    @property
    def min_num_batched_tokens(self) -> int:
        return self.shards[0].min_num_batched_tokens

    def submit(self, request: Request, mode: SequenceMode, now_ns: int) -> list[EngineEvent]:
        tokens = (*request.prompt_token_ids, *request.output_token_ids)
        hashes: list[bytes] = []
        if self._has_prefix_cache and not self._is_known(request.request_id):
            salt = self._hash_salt_of(len(request.prompt_token_ids))
            hashes = block_hashes(tokens, self.limits.block_size_tokens, salt=salt)
        shard = self._shard_for(request.request_id, len(tokens), hashes)
        return shard.submit(request, mode, now_ns)

    def abort(self, request_id: str) -> int:
        return self._holder(request_id).abort(request_id)

    def release(self, request_id: str) -> int:
        return self._holder(request_id).release(request_id)

    def reserve(self, request_id: str, num_tokens: int, hashes: Seq[bytes]) -> None:
        self._shard_for(request_id, num_tokens, hashes).reserve(request_id, num_tokens, hashes)

    def cancel_reservation(self, request_id: str) -> int:
        return self._holder(request_id).cancel_reservation(request_id)

    def commit_reservation(
        self, request_id: str, first_token_id: int, now_ns: int
    ) -> list[EngineEvent]:
        return self._holder(request_id).commit_reservation(request_id, first_token_id, now_ns)

    def num_cached_blocks(self, hashes: Seq[bytes]) -> int:
        return max(shard.num_cached_blocks(hashes) for shard in self.shards)

    def hold_prefix(self, hold_id: str, hashes: Seq[bytes]) -> Reservation:
        """On the shard that has most of it."""
        shard = self._holder(hold_id)
        if not self._is_known(hold_id):
            shard = max(self.shards, key=lambda each: each.num_cached_blocks(hashes))
        return shard.hold_prefix(hold_id, hashes)

    def take_prefix(self, hold_id: str, hashes: Seq[bytes]) -> Reservation:
        """On the shard that its sequence would be given to now."""
        num_tokens = len(hashes) * self.limits.block_size_tokens
        return self._shard_for(hold_id, num_tokens, hashes).take_prefix(hold_id, hashes)

    def adopt_prefix(self, hold_id: str, num_blocks: int) -> None:
        self._holder(hold_id).adopt_prefix(hold_id, num_blocks)

    def take_ended_prefixes(self) -> list[tuple[bytes, ...]]:
        return [hashes for shard in self.shards for hashes in shard.take_ended_prefixes()]

    def grant_reservations(self) -> list[tuple[str, Reservation]]:
        return [granted for shard in self.shards for granted in shard.grant_reservations()]

    def schedule(
        self, max_num_batched_tokens: int, now_ns: int
    ) -> tuple[StepPlan, list[tuple[str, Reservation]]]:
        """One plan with the chunks of all shards, shard by shard."""
        planned = [shard.schedule(max_num_batched_tokens, now_ns) for shard in self.shards]
        chunks = tuple(chunk for plan, _ in planned for chunk in plan.chunks)
        return StepPlan(chunks), [each for _, granted in planned for each in granted]

    def announce_step(self, plan: StepPlan, step: int) -> list[KvComputedEvent]:
        plans = plans_by_shard(plan, len(self.shards), self.limits.num_blocks)
        announced = (
            shard.announce_step(part, step) for shard, part in zip(self.shards, plans, strict=True)
        )
        return [event for events in announced for event in events]

    def commit(self, plan: StepPlan, drawn: Seq[DrawnToken], now_ns: int) -> list[EngineEvent]:
        events: list[EngineEvent] = []
        first = 0
        plans = plans_by_shard(plan, len(self.shards), self.limits.num_blocks)
        for shard, part in zip(self.shards, plans, strict=True):
            end = first + sum(chunk.is_drawing for chunk in part.chunks)
            events += shard.commit(part, drawn[first:end], now_ns)
            first = end
        return events

    def check_conservation(self) -> None:
        for shard in self.shards:
            shard.check_conservation()

    def _is_known(self, request_id: str) -> bool:
        return any(shard.is_known(request_id) for shard in self.shards)

    def _holder(self, request_id: str) -> Scheduler:
        """The shard that a request is on; any for an unknown id, which it answers as such."""
        known = (shard for shard in self.shards if shard.is_known(request_id))
        return next(known, self.shards[0])

    def _shard_for(self, request_id: str, num_tokens: int, hashes: Seq[bytes]) -> Scheduler:
        """Where its sequence or reservation is already, or the shard with the least burden."""
        if self._is_known(request_id):
            return self._holder(request_id)
        return min(self.shards, key=lambda shard: shard.burden(num_tokens, hashes))
