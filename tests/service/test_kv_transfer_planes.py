"""Every data plane keeps the same promises."""

import asyncio

import numpy as np
import pytest

from engine.errors import KvLeaseLostError, UnknownRequestError
from tests.fakes.kv_pair import PLANES, KvPair, kv_pair

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
