"""Prefixes that are on their way already: whoever needs the same ones can let them arrive first."""

import asyncio
import contextlib
from collections.abc import Sequence

from kv_transfer.lease import Lease

PATIENCE_S = 2.0
"""A prefix that takes longer is sent once more."""


class Arrivals:
    """Full blocks, by content hash, that live leases will have filled when they are committed.

    A block has one lease here, the first that wants it, from before its blocks are reserved to its
    end. Loop only.
    """

    def __init__(self, block_size_tokens: int) -> None:
        self._block_size_tokens = block_size_tokens
        self._lease_of: dict[bytes, Lease] = {}
        self._hashes_of: dict[int, Sequence[bytes]] = {}
        self._ends: dict[int, asyncio.Event] = {}

    def expect(self, lease: Lease, block_hashes: Sequence[bytes]) -> None:
        """The lease's blocks will hold this prefix, if it is committed; repeated hashes are one."""
        own = [each for each in dict.fromkeys(block_hashes) if each not in self._lease_of]
        for block_hash in own:
            self._lease_of[block_hash] = lease
        self._hashes_of[lease.lease_id] = own
        self._ends[lease.lease_id] = asyncio.Event()

    def end(self, lease: Lease) -> None:
        """The prefix is there, or it will not come; unknown leases are fine."""
        for block_hash in self._hashes_of.pop(lease.lease_id, ()):
            del self._lease_of[block_hash]
        end = self._ends.pop(lease.lease_id, None)
        if end is not None:
            end.set()

    async def wait(self, num_tokens: int, block_hashes: Sequence[bytes]) -> None:
        """Return when nothing is on its way that this request should rather not get twice."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while (lease := self._worth_waiting_for(num_tokens, block_hashes)) is not None:
                    await self._ends[lease.lease_id].wait()

    def _worth_waiting_for(self, num_tokens: int, block_hashes: Sequence[bytes]) -> Lease | None:
        """The lease that brings most of what is needed, and little else.

        A short prompt must not wait for a long one because both begin with the same instructions.
        """
        coming = [self._lease_of.get(block_hash) for block_hash in block_hashes]
        while coming and coming[-1] is None:
            coming.pop()
        lease = coming[-1] if coming else None
        if lease is None:
            return None
        # Hashes are chained: what stands before the first block on its way is there already.
        first = next(index for index, found in enumerate(coming) if found is not None)
        num_shared = (len(coming) - first) * self._block_size_tokens
        num_needed = num_tokens - first * self._block_size_tokens
        num_theirs = lease.num_tokens - first * self._block_size_tokens
        is_worth_it = 2 * num_shared >= num_needed and 2 * num_shared >= num_theirs
        return lease if is_worth_it else None
