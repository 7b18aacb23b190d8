"""The store's blocks: whole layers, in memory that workers of this host can map; no torch."""

import os
from collections.abc import Sequence
from typing import Self

import numpy as np

from engine.kv_cache.layout import KvLayout
from engine.kv_cache.progress import KvProgress
from engine.kv_cache.shared_blocks import shared_blocks
from kv_transfer.copying import Bytes


class StoreMemory:
    """Implements KvMemory; `with` closes its descriptor."""

    def __init__(self, layout: KvLayout, num_blocks: int) -> None:
        """Raises MemoryError when the host's memory does not suffice."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.progress = KvProgress(layout.num_layers)
        self._num_bytes = num_blocks * layout.block_bytes
        self._fd, self._map = shared_blocks(self._num_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)

    @property
    def host_bytes(self) -> memoryview:
        return memoryview(self._map)[: self._num_bytes]

    @property
    def shared_fd(self) -> int:
        return self._fd

    def block(self, block_id: int) -> memoryview:
        """One block's bytes, writable."""
        start = block_id * self.layout.block_bytes
        return self.host_bytes[start : start + self.layout.block_bytes]

    def read_blocks(self, block_ids: Sequence[int]) -> memoryview:
        return memoryview(np.ascontiguousarray(self._rows[list(block_ids)]).reshape(-1).data)

    def write_slots(
        self, block_id: int, *, layers: slice, heads: slice, slots: slice, data: memoryview
    ) -> None:
        blocks = self._rows.reshape(self.num_blocks, *self.layout.block_shape[:-1], -1)
        view = blocks[block_id, layers, :, heads, slots]
        np.copyto(view, np.frombuffer(data, np.uint8).reshape(view.shape))

    @property
    def _rows(self) -> Bytes:
        return np.frombuffer(self.host_bytes, np.uint8).reshape(self.num_blocks, -1)
