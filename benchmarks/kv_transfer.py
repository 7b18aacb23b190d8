"""How fast a prompt's KV crosses from one process to another, beside what the host can do.

python -m benchmarks.kv_transfer [--quick] [--json FILE]

The receiver is a process of its own. Handovers run one at a time, as a prefill worker runs them:
reserve, push in chunks, commit. Blocks rotate through pools larger than the caches.
"""

import argparse
import asyncio
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
import uvloop
from grpc import aio

from engine.errors import CapacityError, UnknownRequestError
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.runtime.commands import Reservation
from kv_transfer.config import Checksums, DataPlane, TransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from mesh.channel import open_channel
from mesh.server import listening
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size_tokens=16, dtype="bfloat16"
)
"""Of the demo model."""
NUM_BLOCKS = 768
PROMPTS = (512, 2000)
CHUNK_TOKENS = 512


class RotatingLender:
    """Lends blocks in turn; a commit gives them back at once."""

    def __init__(self, num_blocks: int) -> None:
        self._free = deque(range(num_blocks))
        self._held: dict[str, list[int]] = {}

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        num_blocks = LAYOUT.num_blocks_for(num_tokens)
        if num_blocks > len(self._free):
            raise CapacityError(f"need {num_blocks} blocks, {len(self._free)} free")
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        self._held[request_id] = block_ids
        return Reservation(tuple(block_ids), 0)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        if await self.cancel_reservation(request_id) == 0:
            raise UnknownRequestError(request_id)

    async def cancel_reservation(self, request_id: str) -> int:
        block_ids = self._held.pop(request_id, [])
        self._free.extend(block_ids)
        return len(block_ids)


async def receive(data_plane: DataPlane) -> None:
    """Serve as the decode worker until stdin closes; print the address."""
    config = TransferConfig(data_plane=data_plane)
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(KvPool(LAYOUT, NUM_BLOCKS, torch.device("cpu")))
        receiver = await stack.enter_async_context(
            KvReceiver(
                RotatingLender(NUM_BLOCKS),
                ReceivingGroup.single(pool, config),
                receiver_id="receiver",
                model_digest="benchmark",
                config=config,
            )
        )

        def add(server: aio.Server) -> None:
            pb_grpc.add_KvTransferServiceServicer_to_server(KvTransferServicer(receiver), server)

        port = await stack.enter_async_context(
            listening(add, address="127.0.0.1:0", drain_grace_s=0)
        )
        print(f"127.0.0.1:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the runs."""

    way: str
    num_tokens: int
    num_bytes: int
    gb_per_s: float
    """Payload by the time spent moving it."""
    ms: float
    """For a handover: reserve to commit acknowledged."""


async def measure(data_plane: DataPlane, num_runs: int, *, checksums: Checksums) -> list[Row]:
    """Hand prompts over to a receiver process."""
    config = TransferConfig(data_plane=data_plane, checksums=checksums)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.kv_transfer",
        "--receive",
        data_plane,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    address = (await process.stdout.readline()).decode().strip()
    try:
        with KvPool(LAYOUT, NUM_BLOCKS, torch.device("cpu")) as pool:
            async with KvSender(
                SendingGroup.single(pool, config),
                sender_id="sender",
                model_digest="benchmark",
                open_channel=open_channel,
                config=config,
            ) as sender:
                name = (
                    f"{data_plane}, no checksum"
                    if checksums is Checksums.NEVER
                    else str(data_plane)
                )
                return [
                    await _hand_over(sender, address, name, num_tokens, num_runs)
                    for num_tokens in PROMPTS
                ]
    finally:
        process.stdin.close()
        await process.wait()


async def _hand_over(
    sender: KvSender, address: str, name: str, num_tokens: int, num_runs: int
) -> Row:
    num_blocks = LAYOUT.num_blocks_for(num_tokens)
    seconds, write_s = [], []
    for run in range(num_runs + 2):
        local_blocks = [(run * num_blocks + index) % NUM_BLOCKS for index in range(num_blocks)]
        start_s = time.perf_counter()
        async with sender.handover(
            f"{num_tokens}-{run}", decode_address=address, num_tokens=num_tokens
        ) as handover:
            for first_token in range(0, num_tokens, CHUNK_TOKENS):
                num_pushed = min(CHUNK_TOKENS, num_tokens - first_token)
                await handover.push(local_blocks, first_token, num_pushed)
            await handover.commit(1)
        seconds.append(time.perf_counter() - start_s)
        write_s.append(handover.report.write_ns / 1e9)
    num_bytes = num_tokens * LAYOUT.bytes_per_token
    return Row(
        name,
        num_tokens,
        num_bytes,
        num_bytes / statistics.median(write_s[2:]) / 1e9,
        statistics.median(seconds[2:]) * 1e3,
    )


def measure_copy(num_runs: int) -> list[Row]:
    """The same bytes from one buffer to another, by one thread."""
    rows = []
    for num_tokens in PROMPTS:
        num_bytes = num_tokens * LAYOUT.bytes_per_token
        source = np.ones(NUM_BLOCKS * LAYOUT.block_bytes, np.uint8)
        target = np.ones_like(source)
        num_places = len(source) // num_bytes

        def copy(run: int) -> None:
            cut = slice((run % num_places) * num_bytes, (run % num_places + 1) * num_bytes)  # noqa: B023
            np.copyto(target[cut], source[cut])  # noqa: B023

        rows.append(_timed("memory copy", num_tokens, copy, num_runs))
    return rows


def measure_socket(num_runs: int) -> list[Row]:
    """The same bytes through one plain TCP socket, sendall and recv_into; an echo of one byte."""
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()
    most = max(PROMPTS) * LAYOUT.bytes_per_token
    source, target = bytearray(most), bytearray(most)
    rows = []
    with listener, sender, receiver:
        for num_tokens in PROMPTS:
            num_bytes = num_tokens * LAYOUT.bytes_per_token

            def take() -> None:
                for _ in range(num_runs + 2):
                    got = 0
                    while got < num_bytes:  # noqa: B023
                        got += receiver.recv_into(memoryview(target)[got:num_bytes])  # noqa: B023
                    receiver.sendall(b"!")

            def send(run: int) -> None:
                del run
                sender.sendall(memoryview(source)[:num_bytes])  # noqa: B023
                sender.recv(1)

            thread = threading.Thread(target=take)
            thread.start()
            rows.append(_timed("plain socket", num_tokens, send, num_runs))
            thread.join()
    return rows


def _timed(name: str, num_tokens: int, work: Callable[[int], None], num_runs: int) -> Row:
    seconds = []
    for run in range(num_runs + 2):
        start_s = time.perf_counter()
        work(run)
        seconds.append(time.perf_counter() - start_s)
    median_s = statistics.median(seconds[2:])
    num_bytes = num_tokens * LAYOUT.bytes_per_token
    return Row(name, num_tokens, num_bytes, num_bytes / median_s / 1e9, median_s * 1e3)


def table(rows: Sequence[Row]) -> str:
    """One line for each way and prompt."""
    lines = [f"{'way':<20} {'tokens':>6} {'MB':>6} {'GB/s':>6} {'ms':>8}"]
    lines += [
        f"{row.way:<20} {row.num_tokens:>6} {row.num_bytes / 1e6:>6.1f} {row.gb_per_s:>6.2f}"
        f" {row.ms:>8.2f}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_transfer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--receive", type=DataPlane, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.receive is not None:
        uvloop.run(receive(options.receive))
        return 0
    num_runs = 5 if options.quick else 30
    rows = measure_copy(num_runs) + measure_socket(num_runs)
    for data_plane, checksums in (
        (DataPlane.SHM, Checksums.NETWORK),
        (DataPlane.TCP, Checksums.NETWORK),
        (DataPlane.TCP, Checksums.NEVER),
    ):
        rows += uvloop.run(measure(data_plane, num_runs, checksums=checksums))
    print(table(rows))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.encode([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
