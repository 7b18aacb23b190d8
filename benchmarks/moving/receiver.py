"""A decode worker without an engine: lends blocks in turn and gives them back at each commit.

python -m benchmarks.moving.receiver --layout JSON [--data-plane tcp] [--core N]

Prints its address. With --digests it says what each commit brought: request id, xxh3 of its blocks.
"""

import argparse
import asyncio
import json
import os
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack

import uvloop
import xxhash
from grpc import aio

from engine.errors import CapacityError, UnknownRequestError
from engine.kv_cache.layout import KvLayout
from engine.runtime.commands import Reservation
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.servicer import KvTransferServicer
from kv_transfer.store.memory import StoreMemory
from mesh.server import listening
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc

RECEIVER_ID = "receiver"
POOL_BYTES = 280 << 20


class RotatingLender:
    """Lends blocks in turn; a commit gives them back at once."""

    def __init__(self, pool: StoreMemory, *, has_digests: bool) -> None:
        self._pool = pool
        self._layout = pool.layout
        self._has_digests = has_digests
        self._free = deque(range(pool.num_blocks))
        self._held: dict[str, list[int]] = {}

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        num_blocks = self._layout.num_blocks_for(num_tokens)
        if num_blocks > len(self._free):
            raise CapacityError(f"need {num_blocks} blocks, {len(self._free)} free")
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        self._held[request_id] = block_ids
        return Reservation(tuple(block_ids), 0)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        if self._has_digests:
            blocks = self._pool.read_blocks(self._held.get(request_id, ()))
            print(request_id, xxhash.xxh3_64_hexdigest(blocks), flush=True)
        if await self.cancel_reservation(request_id) == 0:
            raise UnknownRequestError(request_id)

    async def cancel_reservation(self, request_id: str) -> int:
        block_ids = self._held.pop(request_id, [])
        self._free.extend(block_ids)
        return len(block_ids)


async def receive(
    layout: KvLayout, config: TransferConfig, *, address: str, has_digests: bool
) -> None:
    """Serve as the decode worker until stdin closes; print the address."""
    num_blocks = POOL_BYTES // layout.block_bytes
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(StoreMemory(layout, num_blocks))
        receiver = await stack.enter_async_context(
            KvReceiver(
                RotatingLender(pool, has_digests=has_digests),
                ReceivingGroup.single(pool, config),
                receiver_id=RECEIVER_ID,
                model_digest="benchmark",
                config=config,
            )
        )

        def add(server: aio.Server) -> None:
            pb_grpc.add_KvTransferServiceServicer_to_server(KvTransferServicer(receiver), server)

        port = await stack.enter_async_context(listening(add, address=address, drain_grace_s=0))
        print(f"{address.rpartition(':')[0]}:{port}", flush=True)
        await asyncio.to_thread(sys.stdin.read)


def main(arguments: Sequence[str]) -> None:
    """Until stdin closes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving.receiver")
    parser.add_argument("--layout", type=json.loads, required=True)
    parser.add_argument("--data-plane", type=DataPlane, default=DataPlane.TCP)
    parser.add_argument("--core", type=int)
    parser.add_argument("--address", default="127.0.0.1:0")
    parser.add_argument("--data-address", default="127.0.0.1:0")
    parser.add_argument("--digests", action="store_true")
    options = parser.parse_args(arguments)
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    config = TransferConfig(data_plane=options.data_plane, data_address=options.data_address)
    layout = KvLayout(**options.layout)
    uvloop.run(receive(layout, config, address=options.address, has_digests=options.digests))


if __name__ == "__main__":
    main(sys.argv[1:])
