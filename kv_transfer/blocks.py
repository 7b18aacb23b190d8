"""Bytes of KV blocks in host memory, addressed by block, box and slot.

Shape suffixes: P blocks, L layers, J parts (key, value), G KV heads, C slots in a block, N slots
of a part of a block, X bytes of one head's vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.kv_cache.layout import KvLayout
from kv_transfer.copying import Bytes
from kv_transfer.memory import KvMemory
from kv_transfer.reshard import Box
from kv_transfer.slot_ranges import SlotRange


class HostBlocks:
    """A pool's bytes as [P, L, J, G, C, X]; a view, which keeps `data` alive until it is gone."""

    def __init__(self, layout: KvLayout, data: memoryview, num_blocks: int) -> None:
        self.layout = layout
        self.flat: Bytes = np.frombuffer(data, np.uint8, count=num_blocks * layout.block_bytes)
        self._blocks_PLJGCX = self.flat.reshape(num_blocks, *layout.block_shape[:-1], -1)

    def slots(self, block_id: int, box: Box, first_slot: int, num_slots: int) -> Bytes:
        """View slots_LJGNX; contiguous when it holds all slots of all heads."""
        return self._blocks_PLJGCX[
            block_id,
            box.first_layer : box.first_layer + box.num_layers,
            :,
            box.first_head : box.first_head + box.num_heads,
            first_slot : first_slot + num_slots,
        ]


@dataclass(frozen=True, slots=True)
class BlockSource:
    """The sender's blocks, in host memory already or copied there for one push."""

    blocks: HostBlocks
    index_of: dict[int, int] | None
    """Where a block stands in `blocks`; None: under its own id."""


def source_from(
    memory: KvMemory, host: HostBlocks | None, parts: Sequence[SlotRange]
) -> BlockSource:
    """The blocks that `parts` read; copies them first when the pool is not host memory."""
    if host is not None:
        return BlockSource(host, None)
    block_ids = list(dict.fromkeys(part.local_block_id for part in parts))
    staged = HostBlocks(memory.layout, memory.read_blocks(block_ids), len(block_ids))
    return BlockSource(staged, {block_id: index for index, block_id in enumerate(block_ids)})


def host_blocks(memory: KvMemory) -> HostBlocks | None:
    """A view of the whole pool, or None when it is not host memory."""
    data = memory.host_bytes
    return None if data is None else HostBlocks(memory.layout, data, memory.num_blocks)
