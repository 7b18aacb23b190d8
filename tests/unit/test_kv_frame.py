"""Frames of the tcp data plane survive the wire; anything else is refused by its first bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frame import (
    ANSWER_BYTES,
    HEADER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushAnswer,
    PushStatus,
    answer_from,
    header_from,
)
from kv_transfer.reshard import Box

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
headers = st.builds(
    FrameHeader,
    flags=st.sampled_from([FrameFlag(value) for value in range(4)]),
    writer_id=u64,
    push=u64,
    lease_id=u64,
    epoch=u64,
    block_id=u32,
    first_slot=u32,
    num_slots=u32,
    box=st.builds(Box, u32, u32, u32, u32),
    num_bytes=u32,
    checksum=u64,
)


@given(headers)
def test_a_header_comes_back_as_it_was(header: FrameHeader) -> None:
    data = header.to_bytes()
    assert len(data) == HEADER_BYTES
    assert header_from(data) == header


@given(st.sampled_from(PushStatus), u64, u64)
def test_an_answer_comes_back_as_it_was(status: PushStatus, push: int, lease_id: int) -> None:
    answer = PushAnswer(status, push, lease_id)
    data = answer.to_bytes()
    assert len(data) == ANSWER_BYTES
    assert answer_from(data) == answer


@given(st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES))
def test_noise_is_no_header(data: bytes) -> None:
    with pytest.raises(FrameError, match="bad_magic"):
        header_from(b"X" + data[1:])


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [(0, 0, "bad_magic"), (4, 1, "bad_version"), (5, 4, "bad_flags"), (7, 1, "bad_flags")],
)
def test_a_foreign_header_is_named(place: int, value: int, reason: str) -> None:
    data = bytearray(
        FrameHeader(FrameFlag.LAST, 9, 1, 2, 3, 4, 5, 6, Box(1, 2, 3, 4), 7, 8).to_bytes()
    )
    data[place] = value
    with pytest.raises(FrameError, match=reason):
        header_from(data)


@pytest.mark.parametrize("place", [0, 4, 5, 7])
def test_a_foreign_answer_is_refused(place: int) -> None:
    data = bytearray(PushAnswer(PushStatus.WRITTEN, 1, 2).to_bytes())
    data[place] = 99
    with pytest.raises(FrameError, match="bad_answer"):
        answer_from(data)
