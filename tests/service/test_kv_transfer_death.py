"""A prefill worker that dies in the middle of a push costs the decode worker one lease of time."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest

from decode_worker.stream import Aborted, GatewayStream, Output
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode
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


async def test_an_abort_that_waits_for_a_stopped_sender_does_not_hold_up_its_gateways_stream() -> (
    None
):
    async with kv_pair("shm") as pair, stuck_sender(pair, "shm") as process:
        process.send_signal(signal.SIGSTOP)
        stream = GatewayStream(pair.engine, pair.receiver)
        stream.submit(request("r"), SequenceMode.DECODE, trace_context=None)
        stream.abort("r")
        stream.submit(request("s"), SequenceMode.LOCAL, trace_context=None)
        outputs: list[Output] = []
        async with asyncio.timeout(30):
            while len(outputs) < 3:
                outputs += await stream.next_outputs()
        assert {output.request_id for output in outputs} == {"s"}
        assert pair.receiver.counters.num_quarantined_leases == 1
        process.kill()
        async with asyncio.timeout(30):
            assert await stream.next_outputs() == [Aborted("r", num_freed_blocks=4)]
        assert pair.engine.stats.num_free_blocks == 16


def request(request_id: str) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(max_tokens=3, ignore_eos=True),
    )
