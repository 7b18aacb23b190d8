"""Fetches the part of a prompt that a store has and this worker lacks, where that pays."""

import asyncio
import contextlib
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Sequence
from typing import TypeVar

from engine.errors import (
    CapacityError,
    DeadlineError,
    EngineDeadError,
    IsthmusError,
    NotReadyError,
    PeerUnavailableError,
)
from engine.runtime.commands import PrefixEngine, PrefixFetchEvent, Reservation
from kv_transfer.group_layout import GroupLayout
from kv_transfer.prefix.fetch_cost import FetchCost
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.stores import Store, Stores
from kv_transfer.receiver import KvReceiver
from kv_transfer.reshard import num_handover_bytes
from kv_transfer.together import to_its_end
from mesh.channel import is_cancelled
from protos.isthmus.v1 import kv_store_pb2 as pb

logger = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_TIMEOUT_S = 5.0
"""For a fetch as long as nobody knows what computing would cost."""
MIN_TIMEOUT_S = 0.5
INCOMPLETE = "incomplete"
"""The store has dropped some of what it had said to have, or could not read it back."""
_AVOIDABLE = (PeerUnavailableError, NotReadyError, DeadlineError)


class _Declined(Exception):  # noqa: N818 - not an error: it says why the prompt is computed
    """The text is the reason, a metric label."""

    def __init__(self, reason: str, *, has_failed: bool = False) -> None:
        super().__init__(reason)
        self.has_failed = has_failed


class PrefixFetcher:
    """Loop only. Blocks that are being written stay taken until no write can reach them."""

    def __init__(
        self,
        engine: PrefixEngine,
        stores: Stores,
        receiver: KvReceiver,
        lender: PrefixLender,
        *,
        worker_id: str,
        layout: GroupLayout,
    ) -> None:
        """Fetch nothing before `address` is set.

        Args:
            engine: whose prefix cache is filled.
            stores: where prefixes may be.
            receiver: this worker's, which has its blocks from `lender`.
            lender: see there.
            worker_id: the receiver's id.
            layout: of this worker's ranks.
        """
        self.address = ""
        """host:port under which stores reach `receiver`'s service."""
        self.cost = FetchCost()
        self.decisions: Counter[tuple[str, str]] = Counter()
        """By decision and reason."""
        self.num_tokens = 0
        self.num_bytes = 0
        self.num_open = 0
        self._coming: dict[bytes, asyncio.Event] = {}
        """Ends of fetches under way, by the first block that each may bring."""
        self._engine = engine
        self._stores = stores
        self._receiver = receiver
        self._lender = lender
        self._worker_id = worker_id
        self._layout = layout

    def is_of_use(self, block_hashes: Sequence[bytes]) -> bool:
        """Whether `fetch` has anything to decide."""
        return bool(self.address and block_hashes) and self._stores.are_known

    async def fetch(self, request_id: str, block_hashes: Sequence[bytes]) -> PrefixFetchEvent:
        """Fill the prefix cache as far as that is cheaper than computing; raises nothing.

        A bug must not cost the request: its prompt is computed, and the reason is `error`.
        Cancelling ends a fetch that is under way; its blocks are free when this returns.

        Args:
            request_id: of the request whose prompt it is.
            block_hashes: of the prompt's blocks that need not be computed if they are cached.
        """
        start_ns = time.time_ns()
        self.num_open += 1
        response, decision, has_failed = pb.FetchResponse(), "compute", False
        try:
            response, reason = await self._fetch(f"{request_id}/prefix", block_hashes)
            decision, has_failed = "fetch", reason == INCOMPLETE
        except _Declined as declined:
            reason, has_failed = str(declined), declined.has_failed
        except IsthmusError as error:
            reason, has_failed = _reason_of(error), True
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, asyncio.CancelledError) and is_cancelled():
                raise
            logger.exception("prefix not fetched request_id=%s", request_id)
            reason, has_failed = "error", True
        finally:
            self.num_open -= 1
        self.decisions[decision, reason] += 1
        num_tokens = response.num_blocks * self._layout.block_size_tokens
        self.num_tokens += num_tokens
        self.num_bytes += response.num_bytes
        return PrefixFetchEvent(
            request_id,
            decision,
            reason,
            num_tokens,
            response.num_bytes,
            start_ns,
            time.time_ns(),
            has_failed,
        )

    async def _fetch(
        self, fetch_id: str, block_hashes: Sequence[bytes]
    ) -> tuple[pb.FetchResponse, str]:
        while missing := block_hashes[self._engine.num_cached_blocks(block_hashes) :]:
            if (end := self._coming.get(missing[0])) is None:
                break
            await end.wait()
        if not missing:
            raise _Declined("cached")
        end = self._coming[missing[0]] = asyncio.Event()
        try:
            return await self._fetch_missing(fetch_id, block_hashes, missing)
        finally:
            del self._coming[missing[0]]
            end.set()

    async def _fetch_missing(
        self, fetch_id: str, block_hashes: Sequence[bytes], missing: Sequence[bytes]
    ) -> tuple[pb.FetchResponse, str]:
        num_local = len(block_hashes) - len(missing)
        self.cost.observe_engine(self._engine.stats)
        reason = self._choose(len(missing))
        store = self._stores.choose(block_hashes[0])
        if store is None and self._stores.are_avoided:
            raise _Declined("avoided", has_failed=True)
        if store is None:
            raise _Declined("no_store")
        start_s = time.monotonic()
        num_found = await self._ask(store, store.query(missing))
        if num_found == 0:
            raise _Declined("absent")
        if reason == "cheaper" and num_found < len(missing):
            self._choose(num_found)
        ask_s = time.monotonic() - start_s
        wanted = block_hashes[: num_local + num_found]
        try:
            taken = await self._engine.take_prefix(fetch_id, wanted)
        except CapacityError:
            raise _Declined("no_blocks", has_failed=True) from None
        start_s = time.monotonic()
        response = await self._receive(store, fetch_id, wanted, taken)
        num_asked = len(wanted) - taken.num_cached_tokens // self._layout.block_size_tokens
        if not num_asked:  # others have brought them meanwhile
            raise _Declined("cached")
        if not response.num_blocks:
            raise _Declined(INCOMPLETE, has_failed=True)
        self.cost.observe_fetch(response.num_bytes, ask_s + time.monotonic() - start_s)
        return response, reason if response.num_blocks >= num_asked else INCOMPLETE

    def _choose(self, num_blocks: int) -> str:
        """The reason to fetch so many blocks; raises _Declined where computing is cheaper."""
        num_tokens = num_blocks * self._layout.block_size_tokens
        num_bytes = num_handover_bytes(self._layout, num_tokens)
        choice = self.cost.choose(num_tokens=num_tokens, num_bytes=num_bytes)
        if not choice.is_fetch:
            raise _Declined(choice.reason)
        return choice.reason

    async def _receive(
        self, store: Store, fetch_id: str, block_hashes: Sequence[bytes], taken: Reservation
    ) -> pb.FetchResponse:
        self._lender.expect(fetch_id, taken)
        try:
            size = self._layout.block_size_tokens
            first = taken.num_cached_tokens // size
            compute_s = self.cost.compute_s((len(block_hashes) - first) * size)
            timeout_s = FIRST_TIMEOUT_S if compute_s is None else max(MIN_TIMEOUT_S, 2 * compute_s)
            request = pb.FetchRequest(
                fetch_id=fetch_id,
                worker_id=self._worker_id,
                address=self.address,
                first_block=first,
                block_hashes=block_hashes[first:],
            )
            return await self._ask(store, store.fetch(request, timeout_s=timeout_s))
        finally:
            await to_its_end(self._give_back(fetch_id))

    async def _give_back(self, fetch_id: str) -> None:
        """Nothing happens to blocks that were adopted; those of a dead engine are nobody's."""
        with contextlib.suppress(EngineDeadError):
            await self._receiver.abort(fetch_id)
            self._lender.forget(fetch_id)
            await self._engine.cancel_reservation(fetch_id)

    async def _ask(self, store: Store, call: Awaitable[T]) -> T:
        try:
            return await call
        except _AVOIDABLE as error:
            self._stores.avoid(store, error)
            raise


def _reason_of(error: IsthmusError) -> str:
    """The error's class as a metric label: PeerUnavailableError is peer_unavailable."""
    name = type(error).__name__.removesuffix("Error") or "Error"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
