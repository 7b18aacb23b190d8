"""Hands prompts over, one after the other, from whatever namespace it runs in.

python -m benchmarks.moving.slow_sender ADDRESS NUM_TOKENS NUM_HANDOVERS    # a JSON line each
"""

import asyncio
import json
import sys
import time

import numpy as np
import xxhash

from benchmarks.moving.slow_layout import LAYOUT
from engine.errors import IsthmusError
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.store.memory import StoreMemory
from mesh.channel import open_channel

CHUNK_TOKENS = 512


async def hand_over(address: str, num_tokens: int, num_handovers: int) -> None:
    """Print what became of each."""
    config = TransferConfig(data_plane=DataPlane.TCP)
    num_blocks = LAYOUT.num_blocks_for(num_tokens)
    with StoreMemory(LAYOUT, num_blocks) as pool:
        host = np.frombuffer(pool.host_bytes, np.uint8)
        async with KvSender(
            SendingGroup.single(pool, config),
            sender_id="near",
            model_digest="benchmark",
            open_channel=open_channel,
            config=config,
        ) as sender:
            for index in range(num_handovers):
                host[:] = np.random.default_rng(index).integers(0, 256, len(host), np.uint8)
                print(json.dumps(await _one(sender, address, f"r{index}", num_tokens)), flush=True)
                print(f"r{index}", xxhash.xxh3_64_hexdigest(host.data), flush=True)


async def _one(
    sender: KvSender, address: str, request_id: str, num_tokens: int
) -> dict[str, object]:
    start_s = time.perf_counter()
    blocks = range(LAYOUT.num_blocks_for(num_tokens))
    error = ""
    try:
        async with sender.handover(
            request_id, decode_address=address, num_tokens=num_tokens
        ) as handover:
            for first in range(0, num_tokens, CHUNK_TOKENS):
                await handover.push(blocks, first, min(CHUNK_TOKENS, num_tokens - first))
            await handover.commit(1)
    except IsthmusError as failure:
        error = f"{type(failure).__name__}: {failure}"
    return {
        "request_id": request_id,
        "seconds": time.perf_counter() - start_s,
        "outcome": handover.report.outcome,
        "retransfers": handover.report.retransfers,
        "num_bytes": handover.report.num_bytes,
        "error": error,
    }


if __name__ == "__main__":
    asyncio.run(hand_over(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
