"""What of a handover a prompt has to wait for: prefill on one core, the receiver on another.

python -m benchmarks.moving.overlap [--model PATH|demo] [--quick]    # prints a JSON line a prompt
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

import uvloop

from benchmarks.moving.figure import Overlap
from benchmarks.moving.receiver import RECEIVER_ID
from engine.config import EngineConfig
from engine.request import Request, SamplingParams
from engine.runtime.build import build_engine
from engine.runtime.commands import RequestEngine, SequenceMode, TokenEvent
from engine.runtime.engine_thread import EngineThread
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from prefill_worker.prefill import Inbox, Prefiller, PrefillJob

PROMPTS = (512, 2000)


async def measure(
    model: Path, data_plane: DataPlane, num_tokens: Sequence[int], num_runs: int
) -> list[Overlap]:
    """Prompts of random tokens, so that no prefix is known."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    engine_config = EngineConfig(num_threads=1, has_prefix_cache=False, kv_pool_bytes=512 << 20)
    engine = build_engine(model, engine_config)
    config = TransferConfig(data_plane=data_plane)
    layout = engine.runner.pool.layout
    async with (
        EngineThread(engine) as thread,
        _receiving(json.dumps(asdict(layout)), data_plane, cores[-1]) as address,
        KvSender(
            SendingGroup.single(engine.runner.pool, config),
            sender_id="prefill",
            model_digest="benchmark",
            open_channel=open_channel,
            config=config,
        ) as sender,
    ):
        prefiller = Prefiller(thread, sender, hash_salt_of=lambda _: 0)
        return [
            await _measured(thread, prefiller, address, data_plane, count, num_runs)
            for count in num_tokens
        ]


async def _measured(
    thread: RequestEngine,
    prefiller: Prefiller,
    address: str,
    data_plane: DataPlane,
    num_tokens: int,
    num_runs: int,
) -> Overlap:
    prefill_ms, exposed_ms, first_token_ms, alone_ms = [], [], [], []
    dice = random.Random(num_tokens)
    for run in range(num_runs + 1):
        prompt = tuple(dice.randrange(1000, 40000) for _ in range(num_tokens))
        alone = await _alone(thread, _request(f"alone-{num_tokens}-{run}", prompt, 1))
        prompt = tuple(dice.randrange(1000, 40000) for _ in range(num_tokens))
        job = PrefillJob(
            request=_request(f"handed-{num_tokens}-{run}", prompt, 2),
            decode_worker_id=RECEIVER_ID,
            decode_address=address,
        )
        token, report = await _handed_over(prefiller, job)
        if run == 0:  # pages, caches, the first handshake
            continue
        timing = token.first
        assert timing is not None
        prefill_ms.append((timing.done_ns - timing.scheduled_ns) / 1e6)
        exposed_ms.append(max(0, report - timing.done_ns) / 1e6)
        first_token_ms.append((timing.done_ns - timing.arrived_ns) / 1e6)
        alone_ms.append(alone)
    return Overlap(
        data_plane=str(data_plane),
        num_tokens=num_tokens,
        prefill_ms=statistics.median(prefill_ms),
        exposed_ms=statistics.median(exposed_ms),
        first_token_ms=statistics.median(first_token_ms),
        alone_ms=statistics.median(alone_ms),
        num_runs=num_runs,
    )


async def _handed_over(prefiller: Prefiller, job: PrefillJob) -> tuple[TokenEvent, int]:
    """The first token, and when the commit was acknowledged."""
    tokens: list[TokenEvent] = []

    async def emit(token: TokenEvent) -> None:
        tokens.append(token)

    report = await prefiller.run(job, emit)
    assert report is not None
    return tokens[0], report.commit_end_ns


async def _alone(engine: RequestEngine, request: Request) -> float:
    """Arrival to first token, in ms."""
    inbox = Inbox()
    engine.submit(request, SequenceMode.LOCAL, inbox)
    while not isinstance(event := await inbox.get(), TokenEvent):
        pass
    assert event.first is not None
    return (event.first.done_ns - event.first.arrived_ns) / 1e6


def _request(request_id: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


@asynccontextmanager
async def _receiving(layout: str, data_plane: DataPlane, core: int) -> AsyncIterator[str]:
    """A receiver on a core of its own; yields its address."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.moving.receiver", "--layout", layout),
        *("--data-plane", data_plane, "--core", str(core)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield (await process.stdout.readline()).decode().strip()
    finally:
        process.stdin.close()
        await process.wait()


async def _print(model: Path, num_runs: int) -> None:
    for overlap in await measure(model, DataPlane.TCP, PROMPTS, num_runs):
        print(json.dumps(asdict(overlap)), flush=True)


def main(arguments: Sequence[str]) -> None:
    """Print figures as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving.overlap")
    parser.add_argument("--model", default="demo", help="a path, or demo")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    from benchmarks.engine import model_path  # imports torch's kernels; only here

    uvloop.run(_print(model_path(options.model), 3 if options.quick else 9))


if __name__ == "__main__":
    main(sys.argv[1:])
