"""What is moved: so many blocks of such a size, scattered over a pool at both ends."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from engine.kv_cache.layout import KvLayout
from kv_transfer.copying import Offsets

BLOCK_BYTES = (4096, 16384, 65536, 262144, 1 << 20)
BLOCK_COUNTS = (1, 8, 64, 512, 4096)
POOL_BYTES = 256 << 20
"""Of each end: far more than the caches. Cases that are larger are left out: all that counts
there is memory, as in the largest that are measured."""
QUICK_BYTES = 64 << 20
"""The largest case when time is short."""
_LAYER_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Case:
    block_bytes: int
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.block_bytes * self.num_blocks


def cases(most_bytes: int) -> list[Case]:
    """By size, then by number."""
    some = [Case(block_bytes, count) for block_bytes in BLOCK_BYTES for count in BLOCK_COUNTS]
    return [case for case in some if case.num_bytes <= most_bytes]


def layout_of(block_bytes: int) -> KvLayout:
    """A pool with blocks of this size: eight tokens, as many layers as it takes."""
    return KvLayout(
        num_layers=block_bytes // _LAYER_BYTES,
        num_kv_heads=1,
        head_dim=64,
        block_size_tokens=8,
        dtype="bfloat16",
    )


def scattered(case: Case, seed: int) -> Iterator[Offsets]:
    """Block ids of one run after the other, in no order; all of the pool is used in turn."""
    order = np.random.default_rng(seed).permutation(POOL_BYTES // case.block_bytes)
    first = 0
    while True:
        if first + case.num_blocks > len(order):
            first = 0
        yield order[first : first + case.num_blocks]
        first += case.num_blocks
