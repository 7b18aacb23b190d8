"""The store's blocks, in memory and on disk: lent to writers, kept still for readers."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from engine.errors import DuplicateRequestError, InvalidRequestError, UnknownRequestError
from engine.runtime.commands import Reservation
from kv_transfer.store.memory import StoreMemory
from kv_transfer.store.shelf import Delivery, Shelf
from kv_transfer.store.spill import Spill

logger = logging.getLogger(__name__)


class BlockStore:
    """Implements BlockLender: a reservation is a delivery of blocks with hashes. Loop only."""

    def __init__(self, memory: StoreMemory, spill: Spill | None) -> None:
        """Both are entered and closed by the caller."""
        self.memory = memory
        self.spill = spill
        self.shelf = Shelf(memory.num_blocks, on_evict=self._on_evict)
        self._deliveries: dict[str, Delivery] = {}
        self._loading = asyncio.Lock()

    # BlockLender.

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        """Never waits: what has no room now is not worth a wait.

        Raises:
            InvalidRequestError: not every block has a hash.
            CapacityError: too many blocks are in use.
        """
        size = self.memory.layout.block_size_tokens
        if num_tokens != len(block_hashes) * size:
            raise InvalidRequestError(
                f"{num_tokens} tokens with {len(block_hashes)} hashes of blocks of {size} tokens;"
                " a store takes whole blocks"
            )
        if request_id in self._deliveries:
            raise DuplicateRequestError(f"{request_id} is under way")
        delivery = self.shelf.expect(block_hashes)
        self._deliveries[request_id] = delivery
        return Reservation(delivery.block_ids, delivery.num_known * size)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        delivery = self._deliveries.pop(request_id, None)
        if delivery is None:
            raise UnknownRequestError(f"nothing is expected as {request_id}")
        self.shelf.accept(delivery)

    async def cancel_reservation(self, request_id: str) -> int:
        delivery = self._deliveries.pop(request_id, None)
        return 0 if delivery is None else self.shelf.refuse(delivery)

    # Readers.

    def num_leading(self, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that are here, in memory or on disk."""
        for index, block_hash in enumerate(block_hashes):
            if block_hash not in self.shelf and not self._is_on_disk(block_hash):
                return index
        return len(block_hashes)

    @asynccontextmanager
    async def reading(self, block_hashes: Sequence[bytes]) -> AsyncIterator[list[int]]:
        """Blocks of the leading hashes that are here, unchanged inside the block."""
        wanted = block_hashes[: self.num_leading(block_hashes)]
        if self.shelf.num_leading(wanted) < len(wanted):
            async with self._loading:
                await self._load(wanted)
        block_ids = self.shelf.pin(wanted)
        try:
            yield block_ids
        finally:
            self.shelf.unpin(wanted[: len(block_ids)])

    async def _load(self, block_hashes: Sequence[bytes]) -> None:
        """Bring blocks back from disk into memory, as far as they are sound and have room."""
        while True:
            delivery = self.shelf.expect(self.shelf.fitting(block_hashes))
            try:
                num_read = await self._read(delivery)
            except BaseException:
                self.shelf.refuse(delivery)
                raise
            if num_read == len(delivery.new_blocks):
                self.shelf.accept(delivery)
                return
            self.shelf.refuse(delivery)
            block_hashes = block_hashes[: delivery.num_known + num_read]

    async def _read(self, delivery: Delivery) -> int:
        """Fill new blocks from disk; returns how many came before the first that is gone."""
        assert self.spill is not None, "blocks on disk without a spill folder"
        for index, (block_hash, block_id) in enumerate(delivery.new_blocks):
            data = await asyncio.to_thread(self.spill.read, block_hash)
            if data is None:
                return index
            self.memory.block(block_id)[:] = data
        return len(delivery.new_blocks)

    def _is_on_disk(self, block_hash: bytes) -> bool:
        return self.spill is not None and block_hash in self.spill

    def _on_evict(self, block_hash: bytes, block_id: int) -> None:
        if self.spill is not None:
            self.spill.put(block_hash, self.memory.block(block_id))
