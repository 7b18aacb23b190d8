"""Tokens of a sequence as slots of blocks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.blocks import HostBlocks, SlotRange, host_blocks, slot_ranges, source_from
from tests.fakes.kv_memory import TINY_LAYOUT, DeviceMemory, HostMemory

SIZE = TINY_LAYOUT.block_size_tokens


@given(st.integers(0, 40), st.integers(0, 40))
def test_ranges_cover_each_token_once(first_token: int, num_tokens: int) -> None:
    end_token = first_token + num_tokens
    blocks = list(range(100, 100 + TINY_LAYOUT.num_blocks_for(end_token)))
    parts = slot_ranges(
        TINY_LAYOUT, blocks, [b + 50 for b in blocks], first_token=first_token, end_token=end_token
    )
    tokens = [
        (part.local_block_id - 100) * SIZE + part.first_slot + slot
        for part in parts
        for slot in range(part.num_slots)
    ]
    assert tokens == list(range(first_token, end_token))
    assert all(part.remote_block_id == part.local_block_id + 50 for part in parts)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_slots_are_the_tokens_of_the_layout(num_parts: int) -> None:
    layout = replace(TINY_LAYOUT, num_parts=num_parts)
    with HostMemory(num_blocks=2, layout=layout).fill_randomly(3) as memory:
        data = memory.host_bytes
        assert data is not None
        view_5d = np.frombuffer(data, np.uint16).reshape(2, *layout.block_shape)
        slots = HostBlocks(layout, data, 2).slots(1, 1, 2)
        expected = view_5d[1, :, :, :, 1:3].reshape(-1, 2, layout.head_dim)
        np.testing.assert_array_equal(slots.copy().view(np.uint16), expected)
        assert slots.nbytes == 2 * layout.bytes_per_token


@pytest.mark.parametrize("max_bytes", [1, 100, 1 << 20])
@pytest.mark.parametrize(("first_slot", "num_slots"), [(0, SIZE), (1, 2)])
def test_slices_are_bounded_and_complete(max_bytes: int, first_slot: int, num_slots: int) -> None:
    with HostMemory().fill_randomly(3) as memory:
        data = memory.host_bytes
        assert data is not None
        blocks = HostBlocks(TINY_LAYOUT, data, 16)
        pieces = list(blocks.slices(3, first_slot, num_slots, max_bytes))
        row_bytes = num_slots * TINY_LAYOUT.head_dim * 2
        assert max(piece.nbytes for piece in pieces) <= max(max_bytes, row_bytes)
        whole = blocks.slots(3, first_slot, num_slots)
        np.testing.assert_array_equal(np.concatenate(pieces), whole)


def test_a_pool_that_is_not_host_memory_is_copied_once_a_push() -> None:
    with DeviceMemory().fill_randomly(3) as memory:
        assert host_blocks(memory) is None
        parts = [SlotRange(9, 0, 1, 3), SlotRange(4, 1, 0, 4), SlotRange(9, 2, 0, 1)]
        source = source_from(memory, None, parts)
        rows = memory.rows()[[9, 4]].reshape(2, 12, SIZE, -1)
        np.testing.assert_array_equal(source.slots(parts[0]), rows[0, :, 1:4])
        np.testing.assert_array_equal(source.slots(parts[1]), rows[1])
