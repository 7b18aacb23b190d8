"""Brings cached prefixes of sequences that ended to a store, behind everything else."""

import asyncio
import contextlib
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

from engine.errors import (
    CapacityError,
    DeadlineError,
    IsthmusError,
    LayoutMismatchError,
    NotReadyError,
    PeerUnavailableError,
)
from engine.runtime.commands import PrefixEngine, Reservation
from kv_transfer.group_layout import GroupLayout
from kv_transfer.prefix.stores import Stores
from kv_transfer.sender import KvSender
from kv_transfer.session import outcome_of

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Prefixes; more are dropped, so that a slow store costs hashes and nothing else."""
PUBLISH_S = 10.0
"""For one prefix, whose blocks the engine lacks meanwhile."""
FLUSH_S = 3.0
"""How long a worker that ends may go on with those that wait."""


class PrefixPublisher:
    """An async context manager; loop only. One prefix at a time, in order of arrival.

    Blocks are held while they are read, so that none is reused under the store's eyes; what the
    engine has evicted before its turn came, or cannot spare, is left out and counted.
    """

    def __init__(
        self,
        engine: PrefixEngine,
        sender: KvSender,
        stores: Stores,
        *,
        worker_id: str,
        layout: GroupLayout,
    ) -> None:
        """`sender` reads the engine's pool; it is entered and closed by the caller."""
        self.outcomes: Counter[str] = Counter()
        """Of prefixes: see docs/operations.md."""
        self.num_tokens = 0
        self._engine = engine
        self._sender = sender
        self._stores = stores
        self._worker_id = worker_id
        self._layout = layout
        self._waiting: deque[Sequence[bytes]] = deque()
        self._has_work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_started = 0
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        tasks = await self._stack.enter_async_context(asyncio.TaskGroup())
        worker = tasks.create_task(self._work(), name="prefix-publisher")
        self._stack.callback(worker.cancel)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Publishes what waits, for FLUSH_S at most."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0 if kind else FLUSH_S):
                await self._idle.wait()
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def offer(self, block_hashes: Sequence[bytes]) -> None:
        """Publish these blocks when their turn comes; returns at once."""
        if self._stores.are_avoided:
            self.outcomes["avoided"] += 1
            return
        if self._stores.choose(block_hashes[0]) is None:
            return
        if len(self._waiting) >= MAX_WAITING:
            self.outcomes["queue_full"] += 1
            return
        self._waiting.append(block_hashes)
        self._idle.clear()
        self._has_work.set()

    async def _work(self) -> None:
        while True:
            await self._has_work.wait()
            self._has_work.clear()
            while self._waiting:
                outcome = await self._publish(self._waiting.popleft())
                self.outcomes[outcome] += 1
            self._idle.set()

    async def _publish(self, block_hashes: Sequence[bytes]) -> str:
        """Returns the outcome."""
        store = self._stores.choose(block_hashes[0])
        if store is None:
            return "avoided" if self._stores.are_avoided else "no_store"
        self._num_started += 1
        publish_id = f"{self._worker_id}/publish-{self._num_started}"
        try:
            async with (
                asyncio.timeout(PUBLISH_S),
                self._held(publish_id, block_hashes) as held,
            ):
                if held is None:
                    return "not_spared"
                if not held.block_ids:
                    return "evicted"
                return await self._push(publish_id, store.address, block_hashes, held)
        except (PeerUnavailableError, NotReadyError, DeadlineError) as error:
            self._stores.avoid(store, error)
            return outcome_of(error)
        except TimeoutError:
            self._stores.avoid(store, DeadlineError(f"{publish_id} takes over {PUBLISH_S:g} s"))
            return "too_slow"
        except IsthmusError as error:
            logger.info("prefix not published: %s", error)
            return outcome_of(error)
        except Exception as error:  # a bug costs a prefix, and not the worker
            logger.exception("prefix not published publish_id=%s", publish_id)
            return outcome_of(error)

    @asynccontextmanager
    async def _held(
        self, publish_id: str, block_hashes: Sequence[bytes]
    ) -> AsyncIterator[Reservation | None]:
        """Blocks that stay as they are inside the block; None when the engine needs them."""
        try:
            held = await self._engine.hold_prefix(publish_id, block_hashes)
        except CapacityError:
            yield None
            return
        try:
            yield held
        finally:
            await self._engine.cancel_reservation(publish_id)

    async def _push(
        self, publish_id: str, address: str, block_hashes: Sequence[bytes], held: Reservation
    ) -> str:
        size = self._layout.block_size_tokens
        hashes = block_hashes[: len(held.block_ids)]

        def hash_blocks(block_size_tokens: int) -> Sequence[bytes]:
            if block_size_tokens != size:
                raise LayoutMismatchError(
                    f"the store's blocks have {block_size_tokens} tokens, ours {size}"
                )
            return hashes

        num_tokens = len(hashes) * size
        async with self._sender.handover(
            publish_id, decode_address=address, num_tokens=num_tokens, hash_blocks=hash_blocks
        ) as handover:
            num_known = handover.num_cached_tokens
            if num_known < num_tokens:
                await handover.push(held.block_ids, 0, num_tokens)
            await handover.commit(0)
        self.num_tokens += num_tokens - num_known
        return "published" if num_known < num_tokens else "known"
