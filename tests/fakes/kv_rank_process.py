"""A rank without a scheduler, in a process of its own; prints its port and where its pool is.

python -m tests.fakes.kv_rank_process NUM_BLOCKS PLANE LAYERS PARTS HEADS SLOTS DIM DTYPE
"""

import asyncio
import sys
from dataclasses import replace

from engine.kv_cache.layout import KvLayout
from kv_transfer.config import DataPlane
from kv_transfer.rank.servicer import serving_rank
from tests.fakes.kv_memory import HostMemory
from tests.fakes.kv_pair import FAST


def arguments_of(num_blocks: int, plane: str, layout: KvLayout) -> list[str]:
    shape = layout.num_layers, layout.num_parts, layout.num_kv_heads, layout.block_size_tokens
    return [*map(str, (num_blocks, plane, *shape, layout.head_dim)), layout.dtype]


async def main(num_blocks: int, plane: str, layout: KvLayout) -> None:
    config = replace(FAST, data_plane=DataPlane(plane))
    with HostMemory(num_blocks, layout) as memory:
        async with serving_rank(memory, config) as port:
            sys.stdout.write(f"{port} {memory.shared_fd}\n")
            sys.stdout.flush()
            await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    num_layers, num_parts, num_heads, num_slots, head_dim = map(int, sys.argv[3:8])
    asyncio.run(
        main(
            int(sys.argv[1]),
            sys.argv[2],
            KvLayout(
                num_layers=num_layers,
                num_parts=num_parts,
                num_kv_heads=num_heads,
                block_size_tokens=num_slots,
                head_dim=head_dim,
                dtype=sys.argv[8],
            ),
        )
    )
