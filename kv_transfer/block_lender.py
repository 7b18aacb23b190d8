"""What the receiving end asks of the engine whose blocks it lends."""

from collections.abc import Sequence
from typing import Protocol

from engine.runtime.commands import Reservation


class BlockLender(Protocol):
    """The part of `engine.runtime.commands.RequestEngine` that concerns reservations; see there."""

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        """Take blocks; waits while the pool is full. Cancelling gives up the place."""

    async def commit(self, request_id: str, first_token_id: int) -> None:
        """The reserved blocks hold their KV; raises UnknownRequestError for unknown ids."""

    async def cancel_reservation(self, request_id: str) -> int:
        """Free what was reserved and not committed; nobody writes to it any more."""
