"""A request's progress through one engine. Mutable; owned by the scheduler."""

from dataclasses import dataclass, field
from enum import StrEnum

from engine.request import FinishReason, Request
from engine.runtime.commands import FirstTokenTiming, SequenceMode
from engine.scheduling.block_hash import extend_block_hashes


class SequenceState(StrEnum):
    AWAITING_KV = "awaiting_kv"
    """Submitted for decoding; its KV is not committed yet."""
    WAITING = "waiting"
    """Needs blocks and a place in the batch."""
    READY = "ready"
    """Its committed KV stands in its blocks; needs a place in the batch only."""
    RUNNING = "running"
    HELD = "held"
    """Prefilled; its blocks stay until they are released."""
    FINISHED = "finished"


ALLOWED_MOVES = {
    SequenceState.AWAITING_KV: {SequenceState.READY, SequenceState.FINISHED},
    SequenceState.WAITING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.READY: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.WAITING, SequenceState.HELD, SequenceState.FINISHED},
    SequenceState.HELD: {SequenceState.FINISHED},
    SequenceState.FINISHED: set[SequenceState](),
}


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, blocks and progress; [0, num_computed_tokens) of the tokens have their KV.

    [num_computed_tokens, num_planned_tokens) are in plans that are being computed.
    """

    request: Request
    mode: SequenceMode
    arrived_ns: int
    state: SequenceState
    ordinal: int
    """Order of arrival among everything that waits for blocks."""
    token_ids: list[int]
    """Prompt, outputs given, outputs drawn."""
    hash_salt: int = 0
    block_ids: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_computed_tokens: int = 0
    num_planned_tokens: int = 0
    num_registered_blocks: int = 0
    num_announced_tokens: int = 0
    num_cached_tokens: int = 0
    scheduled_ns: int | None = None
    has_drawn: bool = False
    is_prefilled_locally: bool = True

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_given_tokens(self) -> int:
        """Tokens that the request came with."""
        return len(self.request.prompt_token_ids) + len(self.request.output_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def num_behind(self) -> int:
        """Tokens to plan before the next one can be drawn; more than one is prefill."""
        return len(self.token_ids) - self.num_planned_tokens

    @property
    def is_in_flight(self) -> bool:
        """Whether a plan with tokens of it is being computed: its blocks are written to."""
        return self.num_planned_tokens > self.num_computed_tokens

    def begin_at(self, num_tokens: int) -> None:
        """Let so many leading tokens be computed, and nothing be in flight."""
        self.num_computed_tokens = self.num_planned_tokens = num_tokens

    def move_to(self, state: SequenceState) -> None:
        assert state in ALLOWED_MOVES[self.state], f"{self.request_id}: {self.state} -> {state}"
        self.state = state

    def hashes_of_full_blocks(self, block_size_tokens: int) -> list[bytes]:
        """Hashes of all full blocks of the tokens known now; grown as tokens come."""
        extend_block_hashes(
            self.block_hashes, self.token_ids, block_size_tokens, salt=self.hash_salt
        )
        return self.block_hashes

    def finish_reason(
        self, eos_token_ids: frozenset[int], max_context_tokens: int
    ) -> FinishReason | None:
        """Why its newest token, a drawn one, is its last; None when it goes on."""
        token_id, sampling = self.token_ids[-1], self.request.sampling
        is_eos = token_id in eos_token_ids and not sampling.ignore_eos
        if (is_eos or token_id in sampling.stop_token_ids) and (
            self.num_output_tokens > sampling.min_tokens
        ):
            return FinishReason.STOP
        if self.num_output_tokens >= sampling.max_tokens or self.num_tokens >= max_context_tokens:
            return FinishReason.LENGTH
        return None

    def first_timing(self, now_ns: int) -> FirstTokenTiming:
        """Of its first token, which was drawn now."""
        assert self.scheduled_ns is not None, f"{self.request_id} drew before its step"
        return FirstTokenTiming(
            self.arrived_ns,
            self.scheduled_ns,
            now_ns,
            self.num_cached_tokens,
            self.is_prefilled_locally,
        )
