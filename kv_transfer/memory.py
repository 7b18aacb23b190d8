"""The KV pool as a data plane sees it: blocks of bytes.

`engine.kv_cache.pool.KvPool` implements it.
"""

from collections.abc import Sequence
from typing import Protocol

from engine.kv_cache.layout import KvLayout
from engine.kv_cache.progress import KvProgress

NONCE_BYTES = 16


class KvMemory(Protocol):
    """Blocks of one pool. Any thread may read or write blocks that it holds a lease on."""

    layout: KvLayout
    num_blocks: int
    progress: KvProgress
    """Of the engine that computes into the blocks."""

    @property
    def host_bytes(self) -> memoryview | None:
        """The pool, flat, writable: block b at [b * block_bytes, (b + 1) * block_bytes).

        None when the pool is not host memory (CUDA): then only read_blocks and write_slots work.
        """

    @property
    def shared_fd(self) -> int | None:
        """The memfd behind `host_bytes`; NONCE_BYTES random bytes follow the last block."""

    def read_blocks(self, block_ids: Sequence[int]) -> memoryview:
        """Copy whole blocks into fresh host memory, in this order."""

    def write_slots(
        self, block_id: int, *, layers: slice, heads: slice, slots: slice, data: memoryview
    ) -> None:
        """Copy slots of a box of one block from host memory, where they stand in this order.

        Blocks until the copy is visible to the engine. Other slots, heads and layers of the block
        may be written at the same time.
        """
