"""Frames of the tcp data plane survive the wire; anything else is refused by its first bytes."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.frame import (
    ANSWER_BYTES,
    HEADER_BYTES,
    FrameError,
    FrameHeader,
    PushAnswer,
    PushStatus,
    answer_from,
    header_from,
    ids_from,
    ids_to_bytes,
)
from kv_transfer.reshard import Box

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
headers = st.builds(
    FrameHeader,
    is_last=st.booleans(),
    has_checksum=st.booleans(),
    writer_id=u64,
    push=u64,
    lease_id=u64,
    epoch=u64,
    num_blocks=u32,
    first_slot=u32,
    num_slots=u32,
    box=st.builds(Box, u32, u32, u32, u32),
    num_bytes=u64,
    ids_checksum=u64,
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


HEADER = FrameHeader(True, False, 9, 1, 2, 3, 4, 5, 6, Box(1, 2, 3, 4), 7, 8)


@pytest.mark.parametrize(("place", "value", "reason"), [(0, 0, "bad_magic"), (4, 1, "bad_version")])
def test_a_foreign_header_is_named(place: int, value: int, reason: str) -> None:
    data = bytearray(HEADER.to_bytes())
    data[place] = value
    with pytest.raises(FrameError, match=reason):
        header_from(data)


def with_bit_flipped(data: bytes, bit: int) -> bytearray:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return flipped


def test_each_bit_of_a_header_and_of_an_answer_counts() -> None:
    for bit in range(8 * HEADER_BYTES):
        with pytest.raises(FrameError):
            header_from(with_bit_flipped(HEADER.to_bytes(), bit))
    answer = PushAnswer(PushStatus.CORRUPT, 1, 2).to_bytes()
    for bit in range(8 * ANSWER_BYTES):
        with pytest.raises(FrameError, match="bad_answer"):
            answer_from(with_bit_flipped(answer, bit))


def test_block_ids_come_back_as_they_were_or_not_at_all() -> None:
    block_ids = np.array([0, 7, 2**32 - 1])
    data = bytearray(ids_to_bytes(block_ids))
    header = HEADER._replace(ids_checksum=xxhash.xxh3_64_intdigest(data))
    np.testing.assert_array_equal(ids_from(header, data), block_ids)
    data[5] ^= 8
    with pytest.raises(FrameError, match="damaged"):
        ids_from(header, data)
