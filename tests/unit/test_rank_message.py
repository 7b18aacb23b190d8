"""What ranks tell each other: it comes out as it went in, and what is wrong is refused."""

from dataclasses import replace

import msgspec
import pytest

from engine.errors import LayoutMismatchError
from engine.kv_cache.share import KvShare
from engine.runtime.followers import check_agreement, fewest_blocks
from engine.runtime.rank_message import (
    LENGTH_BYTES,
    Facts,
    Hello,
    RankReport,
    RankTimes,
    Step,
    Stop,
    check_plan,
    decode_from_follower,
    decode_from_leader,
    encode,
    max_report_bytes,
    max_step_bytes,
)
from engine.scheduling.limits import EngineLimits
from engine.scheduling.step_plan import ScheduledChunk, StepPlan

LIMITS = EngineLimits(vocab_size=100, max_context_tokens=256, num_blocks=32, block_size_tokens=16)
CHUNK = ScheduledChunk("r", 16, tuple(range(20)), (3, 1, 31), 36, is_drawing=True)
FACTS = Facts(
    layout="tp=2",
    model_digest="ab" * 16,
    dtype="float32",
    kv_dtype="int8",
    block_size_tokens=16,
    max_context_tokens=256,
    max_num_batched_tokens=64,
    max_num_sequences=8,
    num_blocks=32,
    kv_share=KvShare((0, 1), (0,)),
)


@pytest.mark.parametrize(
    "message", [Step(StepPlan((CHUNK, CHUNK)), 2, 7, is_watched=False), Stop()]
)
def test_what_the_leader_says_comes_out_as_it_went_in(message: Step | Stop) -> None:
    frame = encode(message)
    assert int.from_bytes(frame[:LENGTH_BYTES], "little") == len(frame) - LENGTH_BYTES
    assert decode_from_leader(frame[LENGTH_BYTES:]) == message


@pytest.mark.parametrize(
    "message", [FACTS, Hello(1, "t"), RankReport(RankTimes(rank=2, busy_s=0.5), {3: [5]})]
)
def test_what_a_follower_says_comes_out_as_it_went_in(
    message: Facts | Hello | RankReport,
) -> None:
    assert decode_from_follower(encode(message)[LENGTH_BYTES:]) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(["Step", "no plan", 1]),
        msgspec.msgpack.encode(["Hello", 1, "t"]),
        msgspec.msgpack.encode({"type": "Stop"}),
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the text is msgspec's
        decode_from_leader(data)


def test_no_plan_of_an_engine_is_longer_than_what_followers_accept() -> None:
    num_sequences = 8
    longest = ScheduledChunk(
        "x" * 512, 0, tuple([99] * (64 // num_sequences)), tuple([31] * 16), 256, is_drawing=True
    )
    step = Step(StepPlan((longest,) * num_sequences), 1 << 20, 1 << 62, is_watched=True)
    assert len(encode(step)) <= max_step_bytes(LIMITS, 64, num_sequences)


def test_no_report_is_longer_than_what_rank_0_accepts() -> None:
    report = RankReport(RankTimes(rank=1), {layer: [1 << 62] * 256 for layer in range(60)})
    assert len(encode(report)) <= max_report_bytes(60, 256)


def test_a_plan_within_the_limits_is_taken() -> None:
    check_plan(StepPlan((CHUNK,)), LIMITS, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"first_position": -1},
        {"first_position": 40},
        {"token_ids": ()},
        {"token_ids": (100,)},
        {"token_ids": (-1,)},
        {"token_ids": tuple([0] * 65), "first_position": 0, "block_ids": tuple(range(5))},
        {"block_ids": (3, 1)},
        {"block_ids": (3, 1, 32)},
        {"block_ids": (3, 1, -1)},
        {"num_prompt_tokens": 257},
    ],
)
def test_a_plan_outside_the_limits_is_refused(change: dict[str, object]) -> None:
    chunk = replace(CHUNK, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="plan"):
        check_plan(StepPlan((chunk,)), LIMITS, 64)


def test_the_pool_is_as_large_as_the_smallest() -> None:
    small = msgspec.structs.replace(FACTS, num_blocks=7, kv_share=KvShare((2,), (1,)))
    check_agreement(FACTS, {1: small})
    assert fewest_blocks({0: FACTS, 1: small}) == 7


def test_each_difference_is_told_with_both_sides() -> None:
    other = msgspec.structs.replace(FACTS, layout="pp=2", max_num_sequences=9)
    with pytest.raises(LayoutMismatchError) as raised:
        check_agreement(FACTS, {1: FACTS, 2: other})
    assert "layout is tp=2 on rank 0 and pp=2 on rank 2" in str(raised.value)
    assert "max_num_sequences is 8 on rank 0 and 9 on rank 2" in str(raised.value)
