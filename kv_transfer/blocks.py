"""Bytes of KV blocks in host memory, addressed by block and slot.

A block is R rows of C slots of X bytes: R = layers x parts (key, value) x KV heads, X = one head's
vector. A token is one slot of every row. numpy copies such views without holding the
interpreter lock.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.kv_cache.layout import KvLayout
from kv_transfer.memory import KvMemory

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Slots [first_slot, first_slot + num_slots) of one block, here and there."""

    local_block_id: int
    remote_block_id: int
    first_slot: int
    num_slots: int


def slot_ranges(
    layout: KvLayout,
    local_block_ids: Sequence[int],
    remote_block_ids: Sequence[int],
    *,
    first_token: int,
    end_token: int,
) -> list[SlotRange]:
    """Cut tokens [first_token, end_token) of a sequence at the borders of its blocks."""
    size = layout.block_size_tokens
    ranges = []
    while first_token < end_token:
        index, first_slot = divmod(first_token, size)
        num_slots = min(size - first_slot, end_token - first_token)
        ranges.append(
            SlotRange(local_block_ids[index], remote_block_ids[index], first_slot, num_slots)
        )
        first_token += num_slots
    return ranges


class HostBlocks:
    """A pool's bytes as [P, R, C, X]; a view, which keeps `data` alive until it is dropped."""

    def __init__(self, layout: KvLayout, data: memoryview, num_blocks: int) -> None:
        self._num_rows = layout.num_layers * layout.num_parts * layout.num_kv_heads
        self._block_bytes = layout.block_bytes
        self._blocks_PRCX: Bytes = np.frombuffer(
            data, np.uint8, count=num_blocks * layout.block_bytes
        ).reshape(num_blocks, self._num_rows, layout.block_size_tokens, -1)

    def slots(self, block_id: int, first_slot: int, num_slots: int) -> Bytes:
        """View [R, num_slots, X] of one block; contiguous when it is the whole block."""
        return self._blocks_PRCX[block_id, :, first_slot : first_slot + num_slots]

    def slices(
        self, block_id: int, first_slot: int, num_slots: int, max_bytes: int
    ) -> Iterator[Bytes]:
        """The same, in views of some rows each and at most `max_bytes` (or one row)."""
        view = self.slots(block_id, first_slot, num_slots)
        num_rows = max(1, max_bytes // max(1, view[0].nbytes))
        for row in range(0, self._num_rows, num_rows):
            yield view[row : row + num_rows]


@dataclass(frozen=True, slots=True)
class BlockSource:
    """The sender's blocks, in host memory already or copied there for one push."""

    blocks: HostBlocks
    index_of: dict[int, int] | None
    """Where a block stands in `blocks`; None: under its own id."""

    def slots(self, part: SlotRange) -> Bytes:
        return self.blocks.slots(self._index(part), part.first_slot, part.num_slots)

    def slices(self, part: SlotRange, max_bytes: int) -> Iterator[Bytes]:
        return self.blocks.slices(self._index(part), part.first_slot, part.num_slots, max_bytes)

    def _index(self, part: SlotRange) -> int:
        block_id = part.local_block_id
        return block_id if self.index_of is None else self.index_of[block_id]


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
