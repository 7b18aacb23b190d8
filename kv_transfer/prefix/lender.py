"""Lends the blocks into which a store writes, beside those of a decode worker's reservations."""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.errors import InvalidRequestError, UnknownRequestError
from engine.runtime.commands import PrefixEngine, Reservation
from kv_transfer.block_lender import BlockLender


@dataclass(slots=True)
class _Taken:
    reservation: Reservation
    num_lent_blocks: int = 0
    """0: not lent yet."""


class PrefixLender:
    """Implements BlockLender. What is expected was taken by whoever expects it, and is theirs."""

    def __init__(
        self, engine: PrefixEngine, requests: BlockLender | None, *, block_size_tokens: int
    ) -> None:
        """Make a lender.

        Args:
            engine: caches what a store has written.
            requests: lends blocks for everything else; None where nothing else is received.
            block_size_tokens: of the engine.
        """
        self._engine = engine
        self._requests = requests
        self._block_size_tokens = block_size_tokens
        self._expected: dict[str, _Taken] = {}

    def expect(self, fetch_id: str, taken: Reservation) -> None:
        """From now on these blocks are lent to who asks under `fetch_id`, once."""
        self._expected[fetch_id] = _Taken(taken)

    def forget(self, fetch_id: str) -> None:
        """Lend no more; what is lent already is not touched."""
        self._expected.pop(fetch_id, None)

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        taken = self._expected.get(request_id)
        if taken is None:
            if self._requests is None:
                raise UnknownRequestError(f"nothing is expected as {request_id}")
            return await self._requests.reserve(request_id, num_tokens, block_hashes)
        if taken.num_lent_blocks:  # its blocks may be in use by now
            raise UnknownRequestError(f"{request_id} was handed over before")
        num_blocks, rest = divmod(num_tokens, self._block_size_tokens)
        block_ids = taken.reservation.block_ids
        if rest or num_blocks > len(block_ids):
            raise InvalidRequestError(
                f"{request_id} is of {len(block_ids)} blocks of {self._block_size_tokens} tokens,"
                f" not of {num_tokens} tokens"
            )
        taken.num_lent_blocks = num_blocks
        cached = min(taken.reservation.num_cached_tokens, num_tokens)
        return Reservation(block_ids[:num_blocks], cached)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        if (taken := self._expected.get(request_id)) is not None:
            await self._engine.adopt_prefix(request_id, taken.num_lent_blocks)
        elif self._requests is not None:
            await self._requests.commit(request_id, first_token_id)
        else:
            raise UnknownRequestError(f"nothing is expected as {request_id}")

    async def cancel_reservation(self, request_id: str) -> int:
        """Blocks of a fetch stay with who took them: no write can reach them any more."""
        if request_id in self._expected or self._requests is None:
            return 0
        return await self._requests.cancel_reservation(request_id)
