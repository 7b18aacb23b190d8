"""Blocks for who has none yet, what the prefix cache has of its tokens included."""

from collections.abc import Callable, Sequence

from engine.scheduling.block_pool import BlockPool
from engine.scheduling.limits import EngineLimits


class Admission:
    """Shared by the sequences and the reservations of one scheduler, which wait in one order."""

    def __init__(
        self,
        block_pool: BlockPool,
        limits: EngineLimits,
        *,
        has_prefix_cache: bool,
        num_kept_free: Callable[[], int],
    ) -> None:
        """`num_kept_free` says how many blocks are to stay free for those that are here already."""
        self.block_pool = block_pool
        self.has_prefix_cache = has_prefix_cache
        self.num_prefix_hit_tokens = 0
        self._limits = limits
        self._num_kept_free = num_kept_free
        self._next_ordinal = 0

    def take_ordinal(self) -> int:
        """The next place in the order of arrival."""
        self._next_ordinal += 1
        return self._next_ordinal

    def cached_prefix(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that may be used again; none where prefixes are not kept."""
        return self.block_pool.cached_prefix(hashes) if self.has_prefix_cache else []

    def has_room(self, num_blocks: int) -> bool:
        """Whether so many may be taken now."""
        return num_blocks + self._num_kept_free() <= self.block_pool.num_free

    def allocate(self, num_tokens: int, hashes: Sequence[bytes]) -> tuple[list[int], int] | None:
        """Blocks for `num_tokens` and how many leading tokens they hold; None when it must wait."""
        cached = self.cached_prefix(hashes)
        num_blocks = self._limits.num_blocks_for(num_tokens)
        if not self.has_room(self.block_pool.num_taken_by(num_blocks, cached)):
            return None
        num_cached_tokens = len(cached) * self._limits.block_size_tokens
        self.num_prefix_hit_tokens += num_cached_tokens
        return self.block_pool.allocate(num_blocks, cached), num_cached_tokens
