"""A prefill worker that dies in the middle of a push costs the decode worker one lease of time."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from tests.fakes.kv_pair import FAST, KvPair, kv_pair

LEASE_S = 1.0  # also what the child asks for


@asynccontextmanager
async def stuck_sender(pair: KvPair, plane: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that is in the middle of writing a block; killed at the end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.fakes.kv_stuck_sender",
        pair.address,
        plane,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"in the middle\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def seconds_until_free(pair: KvPair) -> float:
    start_s = time.monotonic()
    async with asyncio.timeout(30):
        while pair.engine.stats.num_free_blocks < 16:  # noqa: ASYNC110 - the engine sets no event
            await asyncio.sleep(0.005)
    return time.monotonic() - start_s


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_the_blocks_of_a_killed_sender_are_free_after_its_lease(plane: str) -> None:
    async with kv_pair(plane) as pair, stuck_sender(pair, plane) as process:
        assert pair.engine.stats.num_free_blocks == 12
        process.kill()
        assert await seconds_until_free(pair) < LEASE_S + 2
        assert pair.receiver.counters.ended_leases == {"expired": 1}
        assert pair.receiver.counters.num_quarantined_leases == 0


async def test_a_sender_stopped_in_the_middle_of_a_slice_keeps_its_blocks_from_reuse() -> None:
    async with kv_pair("shm") as pair, stuck_sender(pair, "shm") as process:
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(30):
            while pair.receiver.counters.num_quarantined_leases == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.1)  # many tries of the fence
        assert pair.engine.stats.num_free_blocks == 12
        process.kill()
        assert await seconds_until_free(pair) < 2


async def test_a_sender_that_stalls_in_a_frame_is_cut_off_after_its_lease() -> None:
    config = replace(FAST, data_timeout_s=60.0)
    async with kv_pair("tcp", config=config) as pair, stuck_sender(pair, "tcp") as process:
        process.send_signal(signal.SIGSTOP)
        assert await seconds_until_free(pair) < LEASE_S + 2


async def test_an_abort_does_not_wait_for_a_sender_that_stalls_in_a_frame() -> None:
    config = replace(FAST, data_timeout_s=60.0, lease_s=600.0)
    async with kv_pair("tcp", config=config) as pair, stuck_sender(pair, "tcp"):
        async with asyncio.timeout(5):
            assert await pair.receiver.abort("r") == 4
