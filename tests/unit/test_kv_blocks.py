"""Tokens of a sequence as slots of blocks, and boxes of them as bounded copies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.blocks import (
    HostBlocks,
    SlotRange,
    copy_batches,
    host_blocks,
    slot_ranges,
    source_from,
)
from kv_transfer.reshard import Box, Transfer
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, WHOLE_BOX, DeviceMemory, HostMemory

SIZE = TINY_LAYOUT.block_size_tokens


@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 9), st.integers(1, 9))
def test_ranges_cover_each_token_once_on_both_sides(
    first_token: int, num_tokens: int, local_size: int, remote_size: int
) -> None:
    end_token = first_token + num_tokens
    parts = slot_ranges(
        [100 + index for index in range(-(-end_token // local_size))],
        [200 + index for index in range(-(-end_token // remote_size))],
        local_size_tokens=local_size,
        remote_size_tokens=remote_size,
        first_token=first_token,
        end_token=end_token,
    )
    local = [
        (part.local_block_id - 100) * local_size + part.local_slot + slot
        for part in parts
        for slot in range(part.num_slots)
    ]
    remote = [
        (part.remote_block_id - 200) * remote_size + part.remote_slot + slot
        for part in parts
        for slot in range(part.num_slots)
    ]
    assert local == remote == list(range(first_token, end_token))
    for part in parts:
        assert part.local_slot + part.num_slots <= local_size
        assert part.remote_slot + part.num_slots <= remote_size


def test_slots_of_a_box_are_those_of_the_layout() -> None:
    layout = TINY_LAYOUT
    with HostMemory(num_blocks=2).fill_randomly(3) as memory:
        data = memory.host_bytes
        assert data is not None
        whole = np.frombuffer(data, np.uint16).reshape(2, *layout.block_shape)
        slots = HostBlocks(layout, data, 2).slots(1, Box(1, 2, 1, 1), 1, 2)
        np.testing.assert_array_equal(slots.copy().view(np.uint16), whole[1, 1:3, :, 1:2, 1:3])


@pytest.mark.parametrize("max_bytes", [1, 100, 500, 700, 1 << 20])
@pytest.mark.parametrize(("first_slot", "num_slots"), [(0, SIZE), (1, 2)])
def test_copies_are_bounded_and_complete(max_bytes: int, first_slot: int, num_slots: int) -> None:
    parts = [SlotRange(3, first_slot, 5, SIZE - num_slots, num_slots), SlotRange(1, 0, 2, 0, SIZE)]
    transfers = [
        Transfer(0, 0, Box(0, 3, 0, 1), Box(0, 3, 1, 1)),
        Transfer(0, 0, Box(1, 1, 1, 1), Box(0, 1, 0, 1)),
    ]
    with HostMemory().fill_randomly(3) as local, HostMemory() as remote:
        target = host_blocks(remote)
        assert target is not None
        source = source_from(local, host_blocks(local), parts)
        head_bytes = SIZE * TINY_LAYOUT.head_dim * 2
        num_batches = 0
        for batch in copy_batches(source, target, parts, transfers, max_bytes=max_bytes):
            num_batches += 1
            assert sum(piece.nbytes for _, piece in batch) <= max(max_bytes, head_bytes)
            for place, piece in batch:
                np.copyto(place, piece)
        assert (num_batches == 1) == (max_bytes == 1 << 20)
        expected = np.zeros_like(remote.blocks())
        for part in parts:
            here = slice(part.local_slot, part.local_slot + part.num_slots)
            there = slice(part.remote_slot, part.remote_slot + part.num_slots)
            block = local.blocks()[part.local_block_id, :, :, :, here]
            expected[part.remote_block_id, :, :, 1, there] = block[:, :, 0]
            expected[part.remote_block_id, 0, :, 0, there] = block[1, :, 1]
        np.testing.assert_array_equal(remote.blocks(), expected)


def test_a_pool_that_is_not_host_memory_is_copied_once_a_push() -> None:
    with DeviceMemory().fill_randomly(3) as memory:
        assert host_blocks(memory) is None
        parts = [SlotRange(9, 1, 0, 1, 3), SlotRange(4, 0, 1, 0, 4), SlotRange(9, 0, 2, 0, 1)]
        source = source_from(memory, None, parts)
        blocks = memory.blocks()
        np.testing.assert_array_equal(source.slots(parts[0], WHOLE_BOX), blocks[9, :, :, :, 1:4])
        np.testing.assert_array_equal(source.slots(parts[1], WHOLE[0].source), blocks[4])
