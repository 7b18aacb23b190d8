"""Reference-counted KV blocks and the prefix cache over them. Pure Python: no torch, no clock.

A block is free (count 0) or held (count > 0). A free block may still be cached: it keeps its
content and its hash until it is taken for something else, least recently released first.
"""

from collections import OrderedDict
from collections.abc import Sequence

from engine.errors import CapacityError


class BlockPool:
    """Hands out KV blocks; after an error the pool is unchanged."""

    def __init__(self, num_blocks: int, first_block_id: int = 0) -> None:
        """Blocks [first_block_id, first_block_id + num_blocks)."""
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        block_ids = range(first_block_id, first_block_id + num_blocks)
        self._ref_counts = dict.fromkeys(block_ids, 0)
        self._free = OrderedDict.fromkeys(block_ids)  # the next to be taken stands first
        self._hash_of_block: dict[int, bytes] = {}
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, the cached ones included."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._hash_of_block)

    def cached_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks of the longest run of leading `hashes` that are cached; nobody holds them yet."""
        block_ids: list[int] = []
        for block_hash in hashes:
            block_id = self._block_of_hash.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_taken_by(self, num_blocks: int, cached: Sequence[int] = ()) -> int:
        """By how much `allocate` with these arguments would lower `num_free`."""
        return num_blocks - sum(1 for block_id in cached if self._ref_counts[block_id] > 0)

    def allocate(self, num_blocks: int, cached: Sequence[int] = ()) -> list[int]:
        """Hold `num_blocks` blocks, all or nothing: those of `cached`, then ones to be written.

        Args:
            num_blocks: in all, at least len(cached).
            cached: what `cached_prefix` answered, since when the pool has not changed.

        Raises:
            CapacityError: not enough blocks are free.
        """
        assert num_blocks >= len(cached), f"{len(cached)} cached blocks for {num_blocks}"
        needed = self.num_taken_by(num_blocks, cached)
        if needed > len(self._free):
            raise CapacityError(f"need {needed} KV blocks, {len(self._free)} are free")
        for block_id in cached:
            self._hold(block_id)
        fresh = [self._take_oldest() for _ in range(num_blocks - len(cached))]
        return [*cached, *fresh]

    def release(self, block_ids: Sequence[int]) -> int:
        """Give up one hold on each block, the tail first so that prefixes live longer.

        Returns:
            How many of them are free now.
        """
        num_freed = 0
        for block_id in reversed(block_ids):
            assert self._ref_counts[block_id] > 0, f"block {block_id} released twice"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                self._free[block_id] = None
                if block_id not in self._hash_of_block:  # nothing worth keeping: reuse it first
                    self._free.move_to_end(block_id, last=False)
                num_freed += 1
        return num_freed

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Say that a held block's content is complete; the first block with a hash is cached."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} registered while free"
        if block_id not in self._hash_of_block and block_hash not in self._block_of_hash:
            self._hash_of_block[block_id] = block_hash
            self._block_of_hash[block_hash] = block_id

    def check_conservation(self) -> None:
        """Assert that every block is either free or held, and that the two hash tables agree."""
        for block_id, count in self._ref_counts.items():
            assert count >= 0, f"block {block_id} has count {count}"
            assert (count == 0) == (block_id in self._free), f"block {block_id}: count {count}"
        assert len(self._free) <= self.num_blocks, "more free blocks than blocks"
        inverse = {block_hash: block_id for block_id, block_hash in self._hash_of_block.items()}
        assert inverse == self._block_of_hash, "the prefix cache's tables disagree"

    def _hold(self, block_id: int) -> None:
        if self._ref_counts[block_id] == 0:
            del self._free[block_id]
        self._ref_counts[block_id] += 1

    def _take_oldest(self) -> int:
        block_id, _ = self._free.popitem(last=False)
        self._ref_counts[block_id] = 1
        block_hash = self._hash_of_block.pop(block_id, None)
        if block_hash is not None:
            del self._block_of_hash[block_hash]
        return block_id
