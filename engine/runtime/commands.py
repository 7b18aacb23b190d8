"""What crosses the border between asyncio and the engine thread, as frozen values; no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from engine.errors import IsthmusError
from engine.request import FinishReason, Request, TokenLogprobs


class SequenceMode(StrEnum):
    """What an engine does with a request."""

    LOCAL = "local"
    """Prefill and decode here."""
    PREFILL = "prefill"
    """Prefill, draw one token, hold the blocks until released."""
    DECODE = "decode"
    """Wait until KV reserved under this request id is committed, then decode."""


# Events: engine thread -> loop, delivered once a step for each sink.


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One drawn token. Its position is prompt + earlier outputs, counted by the receiver."""

    request_id: str
    token_id: int
    logprobs: TokenLogprobs | None
    finish_reason: FinishReason | None
    first: "FirstTokenTiming | None"
    """With the first token that this engine draws for the request."""


@dataclass(frozen=True, slots=True)
class FirstTokenTiming:
    """time.time_ns() marks of a request's way through this engine."""

    arrived_ns: int
    """Submitted; for DECODE: KV committed."""
    scheduled_ns: int
    """Its first step began."""
    done_ns: int
    """The step that drew the token ended."""
    num_cached_tokens: int
    prefilled_locally: bool


@dataclass(frozen=True, slots=True)
class KvComputedEvent:
    """KV of tokens [first_token, first_token + num_tokens) of a PREFILL request is in the pool.

    Or is on its way there, where `step` is given.
    """

    request_id: str
    block_ids: tuple[int, ...]
    """All blocks of the sequence so far, in order; they stay until the request is released."""
    first_token: int
    num_tokens: int
    step: int | None = None
    """It is being computed: `KvProgress` of each rank's pool says how much of it is there. An event
    of the same tokens, without a step, follows when all of it is."""


@dataclass(frozen=True, slots=True)
class PrefixFetchEvent:
    """It was decided whether to fetch the part of a prompt that is not cached here.

    Comes before all other events of the request. `start_ns` and `end_ns` are time.time_ns() marks.
    """

    request_id: str
    decision: str
    """fetch or compute."""
    reason: str
    """Why: a label of few values, as in the metric."""
    num_tokens: int
    """Tokens that came."""
    num_bytes: int
    start_ns: int
    end_ns: int
    has_failed: bool
    """Less came than was to be fetched."""


@dataclass(frozen=True, slots=True)
class PreemptedEvent:
    """Others needed its blocks: its tokens so far are computed again before its next one comes."""

    request_id: str


@dataclass(frozen=True, slots=True)
class ErrorEvent:
    """The request ended here without a token; its blocks are free."""

    request_id: str
    error: IsthmusError


EngineEvent = TokenEvent | KvComputedEvent | PrefixFetchEvent | PreemptedEvent | ErrorEvent


class EventSink(Protocol):
    """Receives events on the event loop: one call a step with all events that share the sink."""

    def put(self, events: Sequence[EngineEvent]) -> None:
        """Must not block or raise."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Blocks taken in the decode pool for KV that somebody else computes."""

    block_ids: tuple[int, ...]
    """In sequence order, cached prefix first."""
    num_cached_tokens: int
    """Leading tokens whose KV these blocks hold already."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """Counters and gauges since start; a snapshot that any thread may read."""

    num_waiting: int = 0
    num_running: int = 0
    num_waiting_tokens: int = 0
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_prefill_tokens: int = 0
    """Prompt tokens computed here."""
    num_decode_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_prefix_hit_tokens: int = 0
    step_s_total: float = 0.0
    prefill_s_total: float = 0.0
    """Of it, for prompt tokens; a step that does more is shared by its tokens."""


class RequestEngine(Protocol):
    """The asyncio face of an engine: what the workers' servicers and kv_transfer call. Loop only.

    `EngineThread` implements it; `tests.fakes` has one without torch.
    """

    @property
    def stats(self) -> EngineStats: ...

    def submit(self, request: Request, mode: SequenceMode, sink: EventSink) -> None:
        """Start `request`; its events go to `sink` until it finishes or is aborted.

        Raises:
            DuplicateRequestError: the id is running.
            InvalidRequestError: prompt and max_tokens do not fit the context or the pool.
            EngineDeadError: the engine thread is gone.
        """

    async def abort(self, request_id: str) -> int:
        """End a request (and its reservation); returns the blocks freed once they are.

        Unknown ids: 0. No event of the request is delivered after this returns.
        """

    async def release(self, request_id: str) -> int:
        """PREFILL: the handover is over, free the held blocks. Unknown ids: 0."""

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        """DECODE: take blocks for `num_tokens` tokens; waits in order while the pool is full.

        Cancelling gives up the place in the queue (or the blocks). Reserve and submit may come in
        either order.

        Raises:
            CapacityError: it can never fit this pool.
        """

    async def commit(self, request_id: str, first_token_id: int) -> None:
        """DECODE: the reserved blocks hold their KV; decode from `first_token_id` once submitted.

        Raises:
            UnknownRequestError: nothing is reserved under this id (any more).
        """

    async def cancel_reservation(self, request_id: str) -> int:
        """DECODE: free a reservation that was not committed; returns its blocks. Unknown ids: 0.

        The caller guarantees that nobody writes to the blocks any more.
        """


class PrefixEngine(Protocol):
    """The asyncio face of an engine's prefix cache, for whoever keeps prefixes elsewhere too.

    Block hashes are those of `engine.scheduling.block_hash`, from a sequence's start. Hold ids
    share their names with request ids. Loop only; `EngineThread` implements it.
    """

    @property
    def stats(self) -> EngineStats: ...

    def num_cached_blocks(self, block_hashes: Sequence[bytes]) -> int:
        """Leading `block_hashes` that are cached now; the next step may change it."""

    async def hold_prefix(self, hold_id: str, block_hashes: Sequence[bytes]) -> Reservation:
        """Keep the cached ones of leading `block_hashes` unchanged until `cancel_reservation`.

        Cancelling gives them back.

        Raises:
            CapacityError: the engine has no block to spare.
        """

    async def take_prefix(self, hold_id: str, block_hashes: Sequence[bytes]) -> Reservation:
        """A block for each of `block_hashes`, cached ones first; the others are to be written.

        Until `adopt_prefix` or `cancel_reservation`; raises as `hold_prefix`.
        """

    async def adopt_prefix(self, hold_id: str, num_blocks: int) -> None:
        """The first `num_blocks` that were taken hold their KV: cache them; hold none any longer.

        Raises:
            UnknownRequestError: they were given back.
        """

    async def cancel_reservation(self, request_id: str) -> int:
        """Give back what is held or taken; unknown ids: 0."""
