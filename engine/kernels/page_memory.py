"""Memory in huge pages: for packed weights, which stay, and for large results, which come and go.

A large result from malloc is fresh memory more often than not, and the page faults of its first
use can cost as much as the computation that fills it.
"""

import mmap
import sys
from collections import defaultdict

import torch

REGION_BYTES = 64 << 20
ALIGNMENT_BYTES = 4096
NUM_REFERENCES_FREE = 3
"""The pool's list, the loop variable and getrefcount's argument."""


class PageMemory:
    """Cuts huge-page regions into pieces; a region is returned to the system with its last one."""

    def __init__(self) -> None:
        self._region = memoryview(b"")
        self._num_used_bytes = 0

    def take(self, num_bytes: int) -> memoryview:
        """Zeros, aligned to a page."""
        start = -(-self._num_used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if start + num_bytes > self._region.nbytes:
            self._region = _map_region(max(num_bytes, REGION_BYTES))
            start = 0
        self._num_used_bytes = start + num_bytes
        return self._region[start : start + num_bytes]


class ResultMemory:
    """Tensors over pieces that are used again once no tensor refers to them.

    Not for concurrent use. Pieces come in powers of two, so that every size of step shares them.
    """

    def __init__(self) -> None:
        self._pages = PageMemory()
        self._pieces: defaultdict[int, list[memoryview]] = defaultdict(list)

    def empty(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """One dimension, contents undefined."""
        piece = self._free_piece(max(1, num_elements * dtype.itemsize))
        return torch.frombuffer(piece, dtype=dtype, count=num_elements)

    def _free_piece(self, num_bytes: int) -> memoryview:
        pieces = self._pieces[(num_bytes - 1).bit_length()]
        for piece in pieces:  # a tensor over a piece holds a reference to it
            if sys.getrefcount(piece) == NUM_REFERENCES_FREE:
                return piece
        pieces.append(self._pages.take(1 << (num_bytes - 1).bit_length()))
        return pieces[-1]


def _map_region(num_bytes: int) -> memoryview:
    rounded = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(region)
