"""Bytes of KV blocks in host memory, addressed by block, box and slot.

Shape suffixes: P blocks, L layers, J parts (key, value), G KV heads, C slots in a block, N slots
of a part of a block, X bytes of one head's vector. numpy copies such views without holding the
interpreter lock.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from engine.kv_cache.layout import KvLayout
from kv_transfer.memory import KvMemory
from kv_transfer.reshard import Box, Transfer

Bytes = npt.NDArray[np.uint8]
CopyPair = tuple[Bytes, Bytes]
"""Target and source, of one shape."""


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Neighbouring tokens in one block here and one block there."""

    local_block_id: int
    local_slot: int
    remote_block_id: int
    remote_slot: int
    num_slots: int


def slot_ranges(
    local_block_ids: Sequence[int],
    remote_block_ids: Sequence[int],
    *,
    local_size_tokens: int,
    remote_size_tokens: int,
    first_token: int,
    end_token: int,
) -> list[SlotRange]:
    """Cut tokens [first_token, end_token) of a sequence at the block borders of both ends."""
    ranges = []
    while first_token < end_token:
        local_index, local_slot = divmod(first_token, local_size_tokens)
        remote_index, remote_slot = divmod(first_token, remote_size_tokens)
        num_slots = min(
            local_size_tokens - local_slot,
            remote_size_tokens - remote_slot,
            end_token - first_token,
        )
        ranges.append(
            SlotRange(
                local_block_ids[local_index],
                local_slot,
                remote_block_ids[remote_index],
                remote_slot,
                num_slots,
            )
        )
        first_token += num_slots
    return ranges


class HostBlocks:
    """A pool's bytes as [P, L, J, G, C, X]; a view, which keeps `data` alive until it is gone."""

    def __init__(self, layout: KvLayout, data: memoryview, num_blocks: int) -> None:
        self._blocks_PLJGCX: Bytes = np.frombuffer(
            data, np.uint8, count=num_blocks * layout.block_bytes
        ).reshape(num_blocks, *layout.block_shape[:-1], -1)

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

    def slots(self, part: SlotRange, box: Box) -> Bytes:
        """View slots_LJGNX of what `part` and `box` have in common."""
        block_id = part.local_block_id
        index = block_id if self.index_of is None else self.index_of[block_id]
        return self.blocks.slots(index, box, part.local_slot, part.num_slots)


def copy_batches(
    source: BlockSource,
    target: HostBlocks,
    parts: Sequence[SlotRange],
    transfers: Sequence[Transfer],
    *,
    max_bytes: int,
) -> Iterator[list[CopyPair]]:
    """Every copy from here to there, in batches of at most `max_bytes` (or one head's slots)."""
    batch: list[CopyPair] = []
    num_left = max_bytes
    for part, transfer in product(parts, transfers):
        local = source.slots(part, transfer.source)
        remote = target.slots(
            part.remote_block_id, transfer.target, part.remote_slot, part.num_slots
        )
        for cut in _cuts(local.shape, max_bytes):
            pair = remote[cut], local[cut]
            if batch and pair[0].nbytes > num_left:
                yield batch
                batch, num_left = [], max_bytes
            batch.append(pair)
            num_left -= pair[0].nbytes
    if batch:
        yield batch


def _cuts(shape: tuple[int, ...], max_bytes: int) -> Iterator[tuple[slice, ...]]:
    """Index bytes_LJGNX by whole layers, or by heads of one part where a layer is too large."""
    num_layers, num_parts, num_heads = shape[:3]
    head_bytes = prod(shape[3:])
    layer_bytes = num_parts * num_heads * head_bytes
    if layer_bytes <= max_bytes:
        step = max_bytes // layer_bytes
        for layer in range(0, num_layers, step):
            yield (slice(layer, layer + step),)
        return
    step = max(1, max_bytes // head_bytes)
    for layer, part in product(range(num_layers), range(num_parts)):
        for head in range(0, num_heads, step):
            yield slice(layer, layer + 1), slice(part, part + 1), slice(head, head + step)


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
