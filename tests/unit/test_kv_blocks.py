"""Tokens of a sequence as slots of blocks, and boxes of them as bounded copies."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer import copying
from kv_transfer.blocks import HostBlocks, host_blocks, source_from
from kv_transfer.copy_plan import CopyPlan
from kv_transfer.copying import BlockCopies, Bytes, Offsets, RunTable, copy_runs
from kv_transfer.reshard import Box, Transfer
from kv_transfer.runs import merged
from kv_transfer.slot_ranges import SlotRange, slot_ranges
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, DeviceMemory, HostMemory

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
@pytest.mark.parametrize("is_native", [False, True])
def test_copies_are_bounded_and_complete(
    max_bytes: int,
    first_slot: int,
    num_slots: int,
    is_native: bool,
    monkeypatch,
) -> None:
    if not is_native:
        monkeypatch.setattr(copying, "_native", None)
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
        plan = CopyPlan(source.blocks, target, max_bytes=max_bytes)
        for copies in plan.copies(source, parts, transfers):
            num_bytes = 0
            for first, end in copies.slices(max_bytes):
                slice_bytes = copies.runs(first, end)[2].sum()
                assert slice_bytes <= max(max_bytes, head_bytes)
                num_bytes += slice_bytes
                copies.copy(first, end)
                assert copies.are_done(first, end)
            assert num_bytes == copies.num_bytes
        expected = np.zeros_like(remote.blocks())
        for part in parts:
            here = slice(part.local_slot, part.local_slot + part.num_slots)
            there = slice(part.remote_slot, part.remote_slot + part.num_slots)
            block = local.blocks()[part.local_block_id, :, :, :, here]
            expected[part.remote_block_id, :, :, 1, there] = block[:, :, 0]
            expected[part.remote_block_id, 0, :, 0, there] = block[1, :, 1]
        np.testing.assert_array_equal(remote.blocks(), expected)


def spread(
    gaps_and_lengths: list[tuple[int, int]],
) -> tuple[Offsets, Offsets, Offsets, Bytes, Bytes, Bytes]:
    """Target and source offsets and lengths of runs; a source, a target, what it is to become."""
    gaps, lengths = (np.array(column, np.int64) for column in zip(*gaps_and_lengths, strict=True))
    targets = np.cumsum(gaps + lengths) - lengths
    sources = np.cumsum(lengths) - lengths
    source = np.random.default_rng(1).integers(0, 256, lengths.sum() + 1, dtype=np.uint8)
    expected = np.zeros((gaps + lengths).sum() + 1, np.uint8)
    for there, here, length in zip(targets, sources, lengths, strict=True):
        expected[there : there + length] = source[here : here + length]
    return targets, sources, lengths, source, np.zeros_like(expected), expected


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=5))
def test_runs_of_any_length_and_place_are_copied_whole(
    gaps_and_lengths: list[tuple[int, int]],
) -> None:
    targets, sources, lengths, source, target, expected = spread(gaps_and_lengths)
    copy_runs(target, source, targets, sources, lengths)
    np.testing.assert_array_equal(target, expected)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([0, 16, 64, 100, 4096]), st.sampled_from([1, 64, 4095, 4096, 8200])
        ),
        min_size=1,
        max_size=6,
    ),
    st.integers(0, 63),
)
def test_runs_of_blocks_of_any_length_and_place_are_copied_whole(
    gaps_and_lengths: list[tuple[int, int]], shift: int
) -> None:
    targets, sources, lengths, source, target, expected = spread(gaps_and_lengths)
    table = RunTable(targets, sources, lengths, len(target), len(source))
    pool = np.zeros(shift + 3 * len(target), np.uint8)[shift:]
    copies = BlockCopies(pool, source, table)
    copies.aim(np.array([[0, 0, block, 0, 1] for block in (2, 0)], np.int64))
    for first, end in ((0, 1), (1, 2 * len(lengths))):
        if first < end:
            copies.copy(first, end)
    np.testing.assert_array_equal(pool, np.concatenate([expected, target, expected]))


@pytest.mark.parametrize("run", [(7, 0, 2), (0, -1, 2), (0, 0, -1)])
def test_no_run_leaves_its_block(run: tuple[int, int, int]) -> None:
    there, here, length = (np.array([number], np.int64) for number in run)
    with pytest.raises(IndexError):
        BlockCopies(
            np.zeros(24, np.uint8), np.zeros(24, np.uint8), RunTable(there, here, length, 8, 8)
        )


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize(("there", "here", "end"), [(3, 0, 1), (0, 3, 1), (-1, 0, 1), (0, 0, 2)])
def test_no_block_leaves_its_pool(
    there: int, here: int, end: int, is_native: bool, monkeypatch
) -> None:
    if not is_native:
        monkeypatch.setattr(copying, "_native", None)
    offset, length = np.array([0], np.int64), np.array([4], np.int64)
    copies = BlockCopies(
        np.zeros(24, np.uint8), np.zeros(24, np.uint8), RunTable(offset, offset, length, 8, 8)
    )
    copies.aim(np.array([[here, 0, there, 0, 1]]))
    with pytest.raises(IndexError):
        copies.copy(0, end)


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize(
    ("there", "here", "length"), [(9, 0, 2), (0, 9, 2), (-1, 0, 1), (0, 0, -1)]
)
def test_no_run_leaves_its_buffer(
    there: int, here: int, length: int, is_native: bool, monkeypatch
) -> None:
    if not is_native:
        monkeypatch.setattr(copying, "_native", None)
    places = (np.array([place], np.int64) for place in (there, here, length))
    with pytest.raises(IndexError):
        copy_runs(np.zeros(10, np.uint8), np.zeros(10, np.uint8), *places)


def test_runs_that_follow_on_one_another_are_one() -> None:
    offsets, lengths = merged(np.array([0, 4, 8, 20, 16]), np.array([4, 4, 4, 4, 4]))
    assert (offsets.tolist(), lengths.tolist()) == ([0, 20, 16], [12, 4, 4])


def test_a_pool_that_is_not_host_memory_is_copied_once_a_push() -> None:
    with DeviceMemory().fill_randomly(3) as memory:
        assert host_blocks(memory) is None
        parts = [SlotRange(9, 1, 0, 1, 3), SlotRange(4, 0, 1, 0, 4), SlotRange(9, 0, 2, 0, 1)]
        source = source_from(memory, None, parts)
        assert len(source.blocks.flat) == 2 * TINY_LAYOUT.block_bytes
        with HostMemory() as remote:
            target = host_blocks(remote)
            assert target is not None
            plan = CopyPlan(source.blocks, target, max_bytes=1 << 20)
            for copies in plan.copies(source, parts, WHOLE):
                for first, end in copies.slices(1 << 20):
                    copies.copy(first, end)
            blocks, arrived = memory.blocks(), remote.blocks()
            np.testing.assert_array_equal(arrived[0, :, :, :, 1:4], blocks[9, :, :, :, 1:4])
            np.testing.assert_array_equal(arrived[1], blocks[4])
            np.testing.assert_array_equal(arrived[2, :, :, :, :1], blocks[9, :, :, :, :1])
