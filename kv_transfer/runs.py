"""Boxes of blocks as runs of neighbouring bytes of a pool: what copies and sockets work on.

A block is [layer][part][head][slot][bytes], so slots of a box are contiguous head by head, whole
slots of some heads part by part, and whole slots of all heads together.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property, lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from engine.kv_cache.layout import KvLayout
from kv_transfer.copying import Offsets
from kv_transfer.reshard import Box, Transfer
from kv_transfer.slot_ranges import SlotRange, SlotRanges

_WHOLE = 1 << 62
"""Longer than any run."""
_MAX_REGIONS = 1024


class Grain(IntEnum):
    """What one run holds of a block."""

    HEAD = 0
    """Slots of one head of one part."""
    PART = 1
    """All slots of neighbouring heads of one part."""
    LAYERS = 2
    """All of neighbouring layers."""


@dataclass(frozen=True, slots=True)
class BlockRuns:
    """What a region has of each of its blocks, for the C library; not to be changed."""

    offsets: Offsets
    """Inside a block; contiguous, as `lengths` are."""
    lengths: Offsets
    addresses: tuple[int, int]
    """Of both arrays."""
    pool_block_bytes: int
    """From one block of the pool to the next."""


@dataclass(frozen=True)
class Region:
    """The same slots of the same box, in each of some blocks of one pool.

    What it works out it keeps: whoever needs the same one again keeps it, too.
    """

    layout: KvLayout
    box: Box
    first_slot: int
    num_slots: int

    @cached_property
    def block_bytes(self) -> int:
        """That it has of one block."""
        return self.num_slots * self.box.num_cells * self.layout.bytes_per_cell

    @cached_property
    def block_runs(self) -> BlockRuns:
        """As long as they can be."""
        runs = self.runs(self.grain(_WHOLE), _WHOLE)
        offsets, lengths = (np.ascontiguousarray(column) for column in runs)
        addresses = offsets.ctypes.data, lengths.ctypes.data
        return BlockRuns(offsets, lengths, addresses, self.layout.block_bytes)

    def grain(self, max_bytes: int) -> Grain:
        """The coarsest whose runs are contiguous here, and within `max_bytes` where that goes."""
        layout, box = self.layout, self.box
        if self.num_slots != layout.block_size_tokens:
            return Grain.HEAD
        layer_bytes = layout.block_bytes // layout.num_layers
        if box.num_heads == layout.num_kv_heads and layer_bytes <= max_bytes:
            return Grain.LAYERS
        part_bytes = layer_bytes // layout.num_parts // layout.num_kv_heads * box.num_heads
        return Grain.PART if part_bytes <= max_bytes else Grain.HEAD

    def runs(self, grain: Grain, max_bytes: int) -> tuple[Offsets, Offsets]:
        """Offsets inside a block and lengths, in the order of slots_LJGNX; not to be changed."""
        return _runs(self, grain, max_bytes)

    def runs_of(
        self, block_indices: Offsets, grain: Grain, max_bytes: int
    ) -> tuple[Offsets, Offsets]:
        """The same in a pool: for these blocks, one after the other."""
        offsets, lengths = self.runs(grain, max_bytes)
        starts = block_indices * self.layout.block_bytes
        if len(lengths) == 1:  # numpy's small calls are most of a small push's time
            return starts + offsets, lengths.repeat(len(starts))
        all_lengths = lengths[None].repeat(len(starts), axis=0)
        return (starts[:, None] + offsets).reshape(-1), all_lengths.reshape(-1)


@lru_cache(maxsize=1024)
def _runs(region: Region, grain: Grain, max_bytes: int) -> tuple[Offsets, Offsets]:
    """As `Region.runs`: the same few again and again, and for a small push most of its time."""
    layout, box = region.layout, region.box
    layer_bytes = layout.block_bytes // layout.num_layers
    part_bytes = layer_bytes // layout.num_parts
    head_bytes = part_bytes // layout.num_kv_heads
    slot_bytes = head_bytes // layout.block_size_tokens
    layers = np.arange(box.first_layer, box.first_layer + box.num_layers, dtype=np.int64)
    if grain is Grain.LAYERS:
        step = max(1, max_bytes // layer_bytes)
        lengths = np.diff(np.arange(0, box.num_layers, step), append=box.num_layers)
        return layers[::step] * layer_bytes, lengths * layer_bytes
    parts = np.arange(layout.num_parts, dtype=np.int64)
    offsets = layers[:, None] * layer_bytes + parts * part_bytes
    if grain is Grain.PART:
        offsets = (offsets + box.first_head * head_bytes).reshape(-1)
        return offsets, np.full_like(offsets, box.num_heads * head_bytes)
    heads = np.arange(box.first_head, box.first_head + box.num_heads, dtype=np.int64)
    offsets = offsets[:, :, None] + heads * head_bytes + region.first_slot * slot_bytes
    offsets = offsets.reshape(-1)
    return offsets, np.full_like(offsets, region.num_slots * slot_bytes)


class Piece(NamedTuple):
    """Blocks of which the same slots of the same box are to be written."""

    source: Region
    target: Region
    source_blocks: Offsets
    """Where they stand in the source's memory."""
    target_blocks: Offsets

    @property
    def num_bytes(self) -> int:
        return self.source.block_bytes * len(self.source_blocks)

    def cut(self, max_blocks: int) -> "list[Piece]":
        num_blocks = len(self.source_blocks)
        if num_blocks <= max_blocks:
            return [self]
        cuts = [slice(first, first + max_blocks) for first in range(0, num_blocks, max_blocks)]
        return [
            Piece(self.source, self.target, self.source_blocks[some], self.target_blocks[some])
            for some in cuts
        ]


def merged(offsets: Offsets, lengths: Offsets) -> tuple[Offsets, Offsets]:
    """Runs that follow on one another as one."""
    if len(offsets) == 1:
        return offsets, lengths
    is_first = np.ones(len(offsets), np.bool_)
    np.not_equal(offsets[1:], offsets[:-1] + lengths[:-1], out=is_first[1:])
    if is_first.all():
        return offsets, lengths
    firsts = is_first.nonzero()[0]
    return offsets[firsts], np.add.reduceat(lengths, firsts)


class PiecePlan:
    """What pushes from one pool to another are made of; the same regions again and again."""

    def __init__(self, source_layout: KvLayout, target_layout: KvLayout) -> None:
        self.source_layout = source_layout
        self._target_layout = target_layout
        self._regions: dict[tuple[Transfer, int, int, int], tuple[Region, Region]] = {}

    def pieces(
        self,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
        source_index: dict[int, int] | None,
    ) -> Iterator[Piece]:
        """All `transfers` of all `parts`.

        Args:
            parts: what is written.
            transfers: from which box to which.
            source_index: where a block stands in the memory that is read; None: under its own id.
        """
        if not len(parts):
            return
        for same, transfer in product(SlotRanges.of(parts).by_slots(), transfers):
            rows = same.rows
            blocks = rows[:, 0]
            if source_index is not None:
                blocks = np.array(
                    [source_index[block_id] for block_id in blocks.tolist()], np.int64
                )
            yield Piece(*self._regions_of(transfer, rows), blocks, rows[:, 2])

    def _regions_of(self, transfer: Transfer, rows: Offsets) -> tuple[Region, Region]:
        local_slot, remote_slot, num_slots = rows.item(1), rows.item(3), rows.item(4)
        key = transfer, local_slot, remote_slot, num_slots
        found = self._regions.get(key)
        if found is None:
            if len(self._regions) >= _MAX_REGIONS:
                self._regions.clear()
            found = self._regions[key] = (
                Region(self.source_layout, transfer.source, local_slot, num_slots),
                Region(self._target_layout, transfer.target, remote_slot, num_slots),
            )
        return found
