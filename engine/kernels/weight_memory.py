"""Memory for packed weights: large regions in huge pages, which weights fill one after another."""

import mmap

import torch

REGION_BYTES = 64 << 20
ALIGNMENT_BYTES = 4096


class WeightMemory:
    """Hands out zeroed memory; a region is returned to the system with its last weight."""

    def __init__(self) -> None:
        self._region: torch.Tensor | None = None
        self._num_used_bytes = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """A uint8 tensor of zeros, aligned to a page."""
        start = -(-self._num_used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._region is None or start + num_bytes > self._region.numel():
            self._region = _map_region(max(num_bytes, REGION_BYTES))
            start = 0
        self._num_used_bytes = start + num_bytes
        return self._region[start : start + num_bytes]


def _map_region(num_bytes: int) -> torch.Tensor:
    rounded = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    region = mmap.mmap(-1, rounded, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)
