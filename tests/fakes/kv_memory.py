"""KvMemory without torch: a memfd pool, and one that only copies, as a device's does."""

import mmap
import os
from collections.abc import Sequence
from typing import Self

import numpy as np

from engine.kv_cache.layout import KvLayout
from engine.kv_cache.progress import KvProgress
from kv_transfer.memory import NONCE_BYTES
from kv_transfer.reshard import Box, Transfer

TINY_LAYOUT = KvLayout(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size_tokens=4, dtype="bfloat16"
)
WHOLE_BOX = Box(0, 3, 0, 2)
WHOLE = (Transfer(0, 0, WHOLE_BOX, WHOLE_BOX),)
"""From one rank to one rank, both of TINY_LAYOUT."""


class HostMemory:
    """A pool in a memfd, nonce behind it; `with` closes the descriptor."""

    def __init__(
        self,
        num_blocks: int = 16,
        layout: KvLayout = TINY_LAYOUT,
        *,
        is_shared: bool = True,
        path: str | None = None,
    ) -> None:
        """`path` maps a pool that another process has made."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.progress = KvProgress(layout.num_layers)
        self._pool_bytes = num_blocks * layout.block_bytes
        if path is not None:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        else:
            self._fd = os.memfd_create("test-kv", os.MFD_CLOEXEC)
            os.ftruncate(self._fd, self._pool_bytes + NONCE_BYTES)
        self._map = mmap.mmap(self._fd, self._pool_bytes + NONCE_BYTES)
        if path is None:
            self._map[self._pool_bytes :] = os.urandom(NONCE_BYTES)
        self._is_shared = is_shared

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        os.close(self._fd)

    @property
    def shared_fd(self) -> int | None:
        return self._fd if self._is_shared else None

    @property
    def host_bytes(self) -> memoryview | None:
        return memoryview(self._map)[: self._pool_bytes]

    def read_blocks(self, block_ids: Sequence[int]) -> memoryview:
        return memoryview(np.ascontiguousarray(self.rows()[list(block_ids)]).reshape(-1).data)

    def write_slots(
        self, block_id: int, *, layers: slice, heads: slice, slots: slice, data: memoryview
    ) -> None:
        view = self.blocks()[block_id, layers, :, heads, slots]
        view[...] = np.frombuffer(data, np.uint8).reshape(view.shape)

    def blocks(self) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        """[P, L, J, G, C, X]: a view of the pool."""
        return self.rows().reshape(self.num_blocks, *self.layout.block_shape[:-1], -1)

    def rows(self) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
        """The pool, one block a row."""
        return np.frombuffer(self._map, np.uint8, self._pool_bytes).reshape(self.num_blocks, -1)

    def tokens(
        self, block_ids: Sequence[int], first_token: int, end_token: int
    ) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]":
        """[T, L, J, G, X]: the bytes of tokens of the sequence that has these blocks."""
        slots = np.moveaxis(self.blocks()[list(block_ids)], 4, 1)
        return slots.reshape(-1, *slots.shape[2:])[first_token:end_token]

    def fill_randomly(self, seed: int) -> Self:
        self.rows()[:] = np.random.default_rng(seed).integers(
            0, 256, self.rows().shape, dtype=np.uint8
        )
        return self


class DeviceMemory(HostMemory):
    """Can only be read and written by whole blocks."""

    @property
    def shared_fd(self) -> int | None:
        return None

    @property
    def host_bytes(self) -> memoryview | None:
        return None
