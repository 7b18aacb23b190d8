"""What the ranks of one worker tell each other besides tensors: msgpack, checked when it arrives.

A message is its length, four bytes little-endian, and a msgpack array that begins with the
message's name. Rank 0 is the leader: it sends `Step`s, all others follow.
"""

import msgspec

from engine.errors import RankGroupError
from engine.kv_cache.share import KvShare
from engine.scheduling.data_shard import plans_by_shard
from engine.scheduling.limits import EngineLimits
from engine.scheduling.step_plan import StepPlan

LENGTH_BYTES = 4
_LONGEST_BEAT_S = 1.0
_BEATS_PER_TIMEOUT = 4
MAX_START_BYTES = 64 << 10
"""Of a message before the ranks have agreed."""
_MAX_TEXT_CHARS = 2000


class Hello(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's first message."""

    rank: int
    token: str
    """What the leader told its ranks through the rendezvous, and nobody else."""


class Facts(msgspec.Struct, frozen=True, tag=True, array_like=True, kw_only=True):
    """What a rank has loaded; but for `num_blocks` and `kv_share` all ranks must say the same."""

    layout: str
    model_digest: str
    dtype: str
    kv_dtype: str
    block_size_tokens: int
    max_context_tokens: int
    max_num_batched_tokens: int
    max_num_sequences: int
    num_blocks: int
    """For which this rank has memory."""
    kv_share: KvShare


class Agreed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's answer to `Facts`."""

    num_blocks: int
    """Of every rank's pool: the fewest that any has memory for."""


class Refused(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The leader's answer where the facts differ, or another rank failed."""

    reason: str


class Serving(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower's pool can be reached."""

    address: str
    """host:port of its gRPC server."""


class Step(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Compute this now, in so many micro-batches."""

    plan: StepPlan
    num_micro_batches: int
    number: int
    """In every rank's `KvProgress`."""
    is_watched: bool
    """Its KV is handed over layer by layer."""


class StartCounting(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The warm-up is over: the tokens of experts count from here."""


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The worker ends in order."""


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A follower ends because of this error."""

    error: str
    """Class name of the error."""
    text: str
    blamed_rank: int | None
    """Another rank, whose trouble this one only noticed."""


class RankTimes(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Where a rank's time went, since its start."""

    rank: int
    num_steps: int = 0
    step_s: float = 0.0
    """From each plan's arrival until this rank's part was done; of rank 0, while any plan is in
    flight."""
    busy_s: float = 0.0
    """Of it: not waiting for another pipeline stage or data shard."""
    communication_s: float = 0.0
    """Of it: in collectives, waiting included."""
    communication_bytes: int = 0


ExpertTokens = dict[int, list[int]]
"""By layer: how many tokens each of its experts has computed on a rank."""


class RankReport(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """What a rank measures, since its start; a sign of life, too."""

    times: RankTimes
    expert_tokens: ExpertTokens = {}
    """Of mixtures of experts, without the warm-up."""


FollowerMessage = Hello | Facts | Serving | Failed | RankReport
LeaderMessage = Agreed | Refused | Step | StartCounting | Stop

_encoder = msgspec.msgpack.Encoder()
_follower_decoder: msgspec.msgpack.Decoder[FollowerMessage] = msgspec.msgpack.Decoder(
    FollowerMessage
)
_leader_decoder: msgspec.msgpack.Decoder[LeaderMessage] = msgspec.msgpack.Decoder(LeaderMessage)


def encode(message: FollowerMessage | LeaderMessage) -> bytearray:
    """The message with its length before it."""
    frame = bytearray(LENGTH_BYTES)
    _encoder.encode_into(message, frame, LENGTH_BYTES)
    frame[:LENGTH_BYTES] = (len(frame) - LENGTH_BYTES).to_bytes(LENGTH_BYTES, "little")
    return frame


def decode_from_follower(data: bytes | bytearray) -> FollowerMessage:
    """Read a frame without its length.

    Raises:
        ValueError: it is not such a message.
    """
    return _follower_decoder.decode(data)


def decode_from_leader(data: bytes | bytearray) -> LeaderMessage:
    """Read a frame without its length.

    Raises:
        ValueError: it is not such a message.
    """
    return _leader_decoder.decode(data)


def beat_interval_s(timeout_s: float) -> float:
    """How often a follower says its times, where `timeout_s` of silence mean that it is stopped."""
    return min(_LONGEST_BEAT_S, timeout_s / _BEATS_PER_TIMEOUT)


def failure_of(error: BaseException) -> Failed:
    """What a follower says before it ends."""
    text = " ".join(str(error).split())[:_MAX_TEXT_CHARS]
    blamed_rank = error.rank if isinstance(error, RankGroupError) else None
    return Failed(type(error).__name__, text, blamed_rank)


def max_step_bytes(
    limits: EngineLimits, max_num_batched_tokens: int, max_num_sequences: int
) -> int:
    """No step of an engine with these bounds is longer: an integer takes at most 9 bytes."""
    blocks_per_sequence = limits.num_blocks_for(limits.max_context_tokens)
    per_sequence_bytes = 1024 + 9 * blocks_per_sequence
    per_shard_bytes = 9 * max_num_batched_tokens + max_num_sequences * per_sequence_bytes
    return 1024 + limits.num_data_shards * per_shard_bytes


def max_report_bytes(num_layers: int, num_experts: int) -> int:
    """No report of a rank is longer."""
    return MAX_START_BYTES + num_layers * (16 + 9 * num_experts)


def check_plan(plan: StepPlan, limits: EngineLimits, max_num_batched_tokens: int) -> None:
    """Refuse a plan that would read or write outside the pool, or past the embedding.

    Raises:
        ValueError: the text says which chunk.
    """
    for chunk in plan.chunks:
        end = chunk.first_position + len(chunk.token_ids)
        is_good = (
            chunk.first_position >= 0
            and len(chunk.token_ids) > 0
            and end <= limits.max_context_tokens
            and limits.num_blocks_for(end) <= len(chunk.block_ids)
            and min(chunk.block_ids) >= 0
            and max(chunk.block_ids) < limits.num_worker_blocks
            and min(chunk.block_ids) // limits.num_blocks
            == max(chunk.block_ids) // limits.num_blocks
            and min(chunk.token_ids) >= 0
            and max(chunk.token_ids) < limits.vocab_size
            and 0 <= chunk.num_prompt_tokens <= limits.max_context_tokens
        )
        if not is_good:
            raise ValueError(f"the plan's chunk of request {chunk.request_id} is out of bounds")
    shards = plans_by_shard(plan, limits.num_data_shards, limits.num_blocks)
    most_tokens = max(shard.num_tokens for shard in shards)
    if not 0 < most_tokens <= max_num_batched_tokens:
        raise ValueError(f"a plan has {most_tokens} tokens, not 1 to {max_num_batched_tokens}")
