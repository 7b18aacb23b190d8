"""Every data plane keeps the same promises: what a new one must pass (docs/data-planes.md)."""

import asyncio
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import pytest

from engine.errors import KvLeaseLostError, UnknownRequestError
from engine.kv_cache.layout import KvLayout
from kv_transfer import local_sending_rank
from kv_transfer.plane import WritePermit, WriteStoppedError, WriteWindow
from kv_transfer.receiving_rank import ReceivingRank
from kv_transfer.reshard import Box, Transfer
from kv_transfer.sending_rank import RankLink, Target
from kv_transfer.slot_ranges import SlotRange, slot_ranges
from tests.fakes.clock import FakeClock
from tests.fakes.descriptors import open_things
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, HostMemory
from tests.fakes.kv_pair import KvPair, kv_pair
from tests.fakes.kv_planes import FAST, PLANES, ends_of, memories, memory_types

pytestmark = pytest.mark.parametrize("plane", PLANES)


def assert_arrived(pair: KvPair, remote_blocks, local_blocks, first_token, end_token) -> None:
    local = pair.local.tokens(local_blocks, first_token, end_token)
    remote = pair.remote.tokens(remote_blocks, first_token, end_token)
    np.testing.assert_array_equal(local, remote)


@pytest.mark.parametrize(
    "pushes",
    [
        pytest.param([(0, 13)], id="at-once"),
        pytest.param([(0, 4), (4, 4), (8, 5)], id="whole-blocks"),
        pytest.param([(0, 3), (3, 2), (5, 7), (12, 1)], id="across-block-borders"),
        pytest.param([(0, 6), (2, 6), (0, 8), (0, 13)], id="overlapping"),
    ],
)
async def test_every_token_arrives_and_nothing_else_changes(plane: str, pushes) -> None:
    async with kv_pair(plane) as pair:
        before = pair.remote.rows().copy()
        local_blocks = [9, 2, 7, 4]
        async with pair.sender.handover(
            "r", decode_address=pair.address, num_tokens=13
        ) as handover:
            for first_token, num_tokens in pushes:
                await handover.push(local_blocks, first_token, num_tokens)
            await handover.commit(5)
        remote_blocks = handover.block_ids
        assert_arrived(pair, remote_blocks, local_blocks, 0, 13)
        others = [index for index in range(16) if index not in remote_blocks]
        np.testing.assert_array_equal(pair.remote.rows()[others], before[others])
        tail = pair.remote.tokens(remote_blocks, 13, 16)
        pair.remote.rows()[:] = before
        np.testing.assert_array_equal(tail, pair.remote.tokens(remote_blocks, 13, 16))
        assert pair.engine.committed == [("r", 5)]
        report = handover.report
        assert report.num_bytes == 13 * pair.local.layout.bytes_per_token
        assert (report.num_tokens, report.num_cached_tokens) == (13, 0)
        assert report.data_plane == plane.partition("-")[0]
        assert report.outcome == "committed"
        assert report.reserve_start_ns <= report.reserve_end_ns <= report.transfer_start_ns
        assert report.transfer_start_ns < report.transfer_end_ns <= report.commit_start_ns
        assert 0 < report.write_ns <= report.transfer_ns
        assert pair.receiver.counters.num_committed_bytes == report.num_bytes


async def test_leaving_early_gives_the_blocks_back(plane: str) -> None:
    async with kv_pair(plane) as pair:
        async with pair.sender.handover(
            "r", decode_address=pair.address, num_tokens=13
        ) as handover:
            await handover.push([0, 1, 2, 3], 0, 6)
            assert pair.engine.stats.num_free_blocks == 12
        assert pair.engine.stats.num_free_blocks == 16
        assert pair.receiver.counters.ended_leases == {"released": 1}
        assert pair.sender.counters.handovers == {"released": 1}
        with pytest.raises(UnknownRequestError):
            await pair.engine.commit("r", 1)


async def test_an_abort_on_the_decode_side_keeps_the_writer_out(plane: str) -> None:
    async with kv_pair(plane) as pair:
        async with pair.sender.handover(
            "r", decode_address=pair.address, num_tokens=13
        ) as handover:
            await handover.push([0, 1, 2, 3], 0, 6)
            assert await pair.receiver.abort("r") == 4
            assert pair.engine.stats.num_free_blocks == 16
            before = pair.remote.rows().copy()
            with pytest.raises(KvLeaseLostError):
                await handover.push([0, 1, 2, 3], 6, 7)
        np.testing.assert_array_equal(pair.remote.rows(), before)
        assert pair.receiver.counters.ended_leases == {"aborted": 1}
        async with pair.sender.handover("s", decode_address=pair.address, num_tokens=13) as again:
            await again.push([0, 1, 2, 3], 0, 13)
            await again.commit(1)


async def test_handovers_to_one_receiver_do_not_mix(plane: str) -> None:
    async with kv_pair(plane) as pair:

        async def hand_over(name: str, local_blocks: list[int]) -> None:
            async with pair.sender.handover(
                name, decode_address=pair.address, num_tokens=11
            ) as handover:
                for first_token in range(0, 11, 3):
                    await handover.push(local_blocks, first_token, min(3, 11 - first_token))
                await handover.commit(1)
            assert_arrived(pair, handover.block_ids, local_blocks, 0, 11)

        async with asyncio.TaskGroup() as tasks:
            for index in range(5):
                tasks.create_task(hand_over(f"r{index}", [3 * index, 3 * index + 1, 3 * index + 2]))
        assert pair.sender.counters.handovers == {"committed": 5}


# The plane alone, without the protocol around it.

EPOCH = 7
BLOCKS = (3, 9, 1)
PARTS = [SlotRange(0, 0, 3, 0, 4), SlotRange(1, 0, 9, 0, 4), SlotRange(2, 0, 1, 0, 3)]
"""Eleven tokens of blocks 0, 1 and 2."""


@dataclass(frozen=True)
class Plane:
    link: RankLink
    target: ReceivingRank
    permit: WritePermit
    """For lease 5, under which `BLOCKS` may be written."""


@asynccontextmanager
async def joined(
    plane: str,
    local: HostMemory,
    remote: HostMemory,
    *,
    transfers: tuple[Transfer, ...] = WHOLE,
    window: WriteWindow | None = None,
    slice_bytes: int = 1 << 20,
) -> AsyncIterator[Plane]:
    ends = ends_of(plane, local, remote, replace(FAST, slice_bytes=slice_bytes))
    offer = await ends.target.start(EPOCH)
    try:
        await ends.target.open(window or WriteWindow(5, BLOCKS, 0, 11))
        target = Target("there", offer, remote.layout, remote.num_blocks, "127.0.0.1:1", transfers)
        link = await ends.source.open_link([target])
        assert link.data_planes == [ends.name]
        try:
            yield Plane(link, ends.target, WritePermit(5, EPOCH, FakeClock(), 1e9))
        finally:
            link.close()
    finally:
        await ends.target.stop()


def random_box(dice: random.Random, num_layers: int, num_heads: int, layout: KvLayout) -> Box:
    return Box(
        dice.randint(0, layout.num_layers - num_layers),
        num_layers,
        dice.randint(0, layout.num_kv_heads - num_heads),
        num_heads,
    )


@pytest.mark.parametrize("seed", range(12))
async def test_boxes_of_other_shapes_land_where_they_belong(plane: str, seed: int) -> None:
    dice = random.Random(seed)
    local_type, remote_type = memory_types(plane)
    sizes = [dice.choice([1, 3, 4, 16]) for _ in range(2)]
    source_layout, target_layout = (
        replace(
            TINY_LAYOUT,
            num_layers=dice.randint(1, 5),
            num_kv_heads=dice.randint(1, 4),
            block_size_tokens=size,
        )
        for size in sizes
    )
    num_layers = dice.randint(1, min(source_layout.num_layers, target_layout.num_layers))
    num_heads = dice.randint(1, min(source_layout.num_kv_heads, target_layout.num_kv_heads))
    here = random_box(dice, num_layers, num_heads, source_layout)
    there = random_box(dice, num_layers, num_heads, target_layout)
    first, end = sorted(dice.sample(range(41), 2))
    blocks = [dice.sample(range(48), -(-end // size)) for size in sizes]
    parts = slot_ranges(
        *blocks,
        local_size_tokens=sizes[0],
        remote_size_tokens=sizes[1],
        first_token=first,
        end_token=end,
    )
    with (
        local_type(48, source_layout).fill_randomly(1) as local,
        remote_type(48, target_layout).fill_randomly(2) as remote,
    ):
        expected = remote.blocks().copy()
        for token in range(first, end):
            (local_index, slot), (remote_index, remote_slot) = (divmod(token, n) for n in sizes)
            of_token = local.blocks()[
                blocks[0][local_index],
                here.first_layer : here.first_layer + num_layers,
                :,
                here.first_head : here.first_head + num_heads,
                slot,
            ]
            expected[
                blocks[1][remote_index],
                there.first_layer : there.first_layer + num_layers,
                :,
                there.first_head : there.first_head + num_heads,
                remote_slot,
            ] = of_token
        window = WriteWindow(5, tuple(blocks[1]), first, end)
        transfers = (Transfer(0, 0, here, there),)
        async with joined(plane, local, remote, transfers=transfers, window=window) as pair:
            written = await pair.link.write(pair.permit, parts)
        assert written.num_bytes == (end - first) * here.num_cells * TINY_LAYOUT.bytes_per_cell
        np.testing.assert_array_equal(remote.blocks(), expected)


async def test_a_fenced_lease_lets_nothing_in(plane: str) -> None:
    with memories(plane) as (local, remote):
        before = remote.rows().copy()
        async with joined(plane, local, remote) as pair:
            await pair.target.fence(5)
            with pytest.raises(KvLeaseLostError):
                await pair.link.write(pair.permit, PARTS)
        np.testing.assert_array_equal(remote.rows(), before)


async def test_a_permit_that_ended_writes_nothing(plane: str) -> None:
    with memories(plane) as (local, remote):
        before = remote.rows().copy()
        async with joined(plane, local, remote) as pair:
            pair.permit.move(-1)
            with pytest.raises(KvLeaseLostError):
                await pair.link.write(pair.permit, PARTS)
            pair.permit.move(1e9)
            pair.permit.stop()
            with pytest.raises(WriteStoppedError):
                await pair.link.write(pair.permit, PARTS)
        np.testing.assert_array_equal(remote.rows(), before)


class HeldPermit(WritePermit):
    """Holds the writer up at its third look."""

    def __init__(self) -> None:
        super().__init__(5, EPOCH, FakeClock(), 1e9)
        self.num_looks = 0
        self.is_held, self.go_on = threading.Event(), threading.Event()

    def check(self) -> None:
        self.num_looks += 1
        if self.num_looks == 3:
            self.is_held.set()
            assert self.go_on.wait(10)


async def test_nothing_changes_once_the_fence_is_there(plane: str, monkeypatch) -> None:
    monkeypatch.setattr(local_sending_rank, "QUICK_BYTES", 0)  # held up in a thread
    with memories(plane) as (local, remote):
        async with joined(plane, local, remote, slice_bytes=100) as pair:
            permit = HeldPermit()
            write = pair.link.write(permit, PARTS)
            await asyncio.to_thread(permit.is_held.wait, 10)
            fence = asyncio.ensure_future(pair.target.fence(5))
            await asyncio.wait([fence], timeout=0.05)
            if not fence.done():  # it waits for what is under way
                permit.go_on.set()
            await fence
            fenced = remote.rows().copy()
            permit.go_on.set()
            await asyncio.wait([write])
            assert isinstance(write.exception(), KvLeaseLostError | None)
        np.testing.assert_array_equal(remote.rows(), fenced)


async def test_what_was_written_again_is_what_counts(plane: str) -> None:
    """A write may be repeated, also after one that failed in the middle."""
    with memories(plane) as (local, remote):
        async with joined(plane, local, remote, slice_bytes=100) as pair:

            class FailingPermit(HeldPermit):
                def check(self) -> None:
                    self.num_looks += 1
                    if self.num_looks == 3:
                        raise WriteStoppedError("in the middle")

            with pytest.raises(WriteStoppedError):
                await pair.link.write(FailingPermit(), PARTS)
            for _ in range(2):
                await pair.link.write(pair.permit, PARTS)
            await pair.target.fence(5)
        np.testing.assert_array_equal(remote.tokens(BLOCKS, 0, 11), local.tokens([0, 1, 2], 0, 11))


async def test_nothing_is_left_open(plane: str) -> None:
    with memories(plane) as (local, remote):

        async def use() -> None:
            async with joined(plane, local, remote) as pair:
                await pair.link.write(pair.permit, PARTS)

        await use()  # what is made once a process stays
        before = held()
        await use()
        async with asyncio.timeout(10):
            while held() - before:  # noqa: ASYNC110 - the link closes in its own thread
                await asyncio.sleep(0.002)


def held() -> Counter[str]:
    return Counter({name: n for name, n in open_things().items() if "asyncio_" not in name})
