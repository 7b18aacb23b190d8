"""The decode worker's end of handovers: leases on its blocks, and who may write them."""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from engine.errors import (
    CapacityError,
    InvalidRequestError,
    IsthmusError,
    KvLeaseLostError,
    UnknownRequestError,
)
from engine.kv_cache.layout import KvLayout
from kv_transfer.arrivals import Arrivals
from kv_transfer.block_lender import BlockLender
from kv_transfer.config import TransferConfig
from kv_transfer.counters import ReceiverCounters
from kv_transfer.group_layout import GroupLayout
from kv_transfer.lease import Lease, LeaseTable
from kv_transfer.offer import PROTOCOL_VERSION, Offer, RankOffer, check_same
from kv_transfer.plane import WriteWindow
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.reshard import num_handover_bytes
from kv_transfer.states import LeaseEvent, LeaseState

logger = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP_INTERVAL_S = 0.1


@dataclass(slots=True)
class _Ending:
    """What callers of a lease's end wait for."""

    num_freed_blocks: asyncio.Future[int]
    committed: asyncio.Future[None]


class KvReceiver:
    """Lends blocks of `engine` to prefill workers. An async context manager; loop only.

    A block that was lent goes back to the engine only when every data plane of every rank has
    fenced its lease: no write can begin any more and none is under way.
    """

    def __init__(
        self,
        engine: BlockLender,
        group: ReceivingGroup,
        *,
        receiver_id: str,
        model_digest: str,
        config: TransferConfig,
        epoch: int | None = None,
        shares_prefixes: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Nothing is opened yet.

        Args:
            engine: whose blocks are lent.
            group: the ranks that hold them.
            receiver_id: this worker.
            model_digest: what the weights were read from.
            config: see there.
            epoch: of this start of the worker; drawn when not given.
            shares_prefixes: the engine keeps prefixes, so that one that is on its way is worth
                waiting for.
            clock: monotonic seconds, for leases.
        """
        self.epoch = secrets.randbits(63) if epoch is None else epoch
        self._engine = engine
        self._group = group
        self._offers: tuple[RankOffer, ...] = ()
        self._receiver_id = receiver_id
        self._model_digest = model_digest
        self._config = config
        self._table = LeaseTable(clock, max_lease_s=config.lease_s, max_hold_s=config.max_hold_s)
        self._arrivals = Arrivals(group.layout.block_size_tokens)
        self._shares_prefixes = shares_prefixes
        self._endings: dict[int, _Ending] = {}
        self._waits: dict[int, asyncio.Timeout] = {}
        self._num_committed_tokens = 0
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()
        self._running: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        """Raises what `ReceivingRank.start` raises."""
        async with AsyncExitStack() as stack:
            self._offers = await self._group.start(self.epoch)
            stack.push_async_callback(self._group.stop)
            await stack.enter_async_context(self._tasks)
            stack.callback(self._abandon)
            self._spawn(self._sweep_for_ever(), "kv-lease-sweeper")
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def layout(self) -> GroupLayout:
        return self._group.layout

    @property
    def counters(self) -> ReceiverCounters:
        """A snapshot; any thread may take it."""
        return ReceiverCounters(
            num_live_leases=self._table.num_live,
            num_quarantined_leases=self._table.num_quarantined,
            num_waiting_reserves=self._table.num_waiting,
            num_committed_tokens=self._num_committed_tokens,
            num_committed_bytes=num_handover_bytes(self.layout, self._num_committed_tokens),
            ended_leases={str(reason): n for reason, n in dict(self._table.ended).items()},
            dropped_connections=self._group.dropped,
        )

    def handshake(
        self, *, sender_id: str, layout: KvLayout, model_digest: str, protocol_version: int
    ) -> Offer:
        """Compare both ends.

        Raises:
            LayoutMismatchError: they differ; the text shows both.
        """
        check_same(
            (protocol_version, model_digest, layout),
            (PROTOCOL_VERSION, self._model_digest, self.layout.full),
            names=(sender_id, self._receiver_id),
        )
        return Offer(
            receiver_id=self._receiver_id,
            epoch=self.epoch,
            layout=self.layout,
            num_blocks=self._group.num_blocks,
            ranks=self._offers,
        )

    async def reserve(
        self,
        request_id: str,
        *,
        owner: str,
        epoch: int,
        num_tokens: int,
        block_hashes: Sequence[bytes],
        lease_s: float,
    ) -> Lease:
        """Take blocks and lend them to `owner`; waits while the pool is full.

        Cancelling gives up the place. Whoever gets the lease must see to it that it is released
        when its owner does not learn of it.

        Raises:
            KvLeaseLostError: the epoch is not this one's.
            UnknownRequestError: the request was aborted meanwhile.
            DuplicateRequestError: blocks are reserved for this request already.
            InvalidRequestError, CapacityError: it can never fit.
            RankDeadError: a rank of this worker is gone; nothing is lent.
        """
        self._check_epoch(epoch)
        layout, num_blocks = self.layout, self._group.num_blocks
        if not request_id or num_tokens == 0:
            raise InvalidRequestError("a reservation needs a request id and at least one token")
        if layout.num_blocks_for(num_tokens) > num_blocks:
            raise CapacityError(
                f"{num_tokens} tokens can never fit {num_blocks} blocks of"
                f" {layout.block_size_tokens}"
            )
        await self._wait_for_quarantine(request_id)
        lease = self._table.wait(request_id, owner=owner, num_tokens=num_tokens)
        loop = asyncio.get_running_loop()
        self._endings[lease.lease_id] = _Ending(loop.create_future(), loop.create_future())
        try:
            await self._take_blocks(lease, block_hashes, lease_s)
        except BaseException:
            self._table.revoke(lease, LeaseEvent.WITHDRAWN)
            self._reclaim(lease)
            raise
        window = WriteWindow(
            lease.lease_id, lease.block_ids, lease.num_cached_tokens, lease.num_tokens
        )
        try:
            await self._group.open(window)
        except BaseException:
            if self._table.revoke(lease, LeaseEvent.REFUSED):
                self._reclaim(lease)
            raise
        return lease

    def renew(self, epoch: int, lease_ids: Sequence[int], lease_s: float) -> list[int]:
        """Returns the leases that are lost; raises KvLeaseLostError when all are: another epoch."""
        self._check_epoch(epoch)
        return self._table.renew(lease_ids, lease_s)

    async def commit(
        self, epoch: int, lease_id: int, *, num_bytes: int, first_token_id: int
    ) -> None:
        """Hand the blocks to the sequence; repeating it gives the first call's outcome.

        Raises:
            KvLeaseLostError: the lease is over, or the engine gave the request up.
            InvalidRequestError: another number of bytes was written than reserved; it is over now.
        """
        self._check_epoch(epoch)
        lease = self._table.get(lease_id)
        if lease is None:
            raise KvLeaseLostError(f"lease {lease_id} is over")
        committed = self._endings[lease_id].committed
        if not committed.done() and self._table.begin_commit(lease):
            work = self._commit(lease, num_bytes, first_token_id)
            self._spawn(work, f"kv-commit-{lease.request_id}")
        await asyncio.shield(committed)

    async def release(self, epoch: int, lease_id: int) -> int:
        """Give a lease back; returns its blocks once they are free. Over already: harmless."""
        if epoch != self.epoch or (lease := self._table.get(lease_id)) is None:
            return 0
        return await self._end(lease, LeaseEvent.RELEASED)

    async def withdraw(self, epoch: int, request_id: str) -> int:
        """As release, for a sender that does not know whether its reservation was granted."""
        lease = self._table.held_by(request_id)
        if epoch != self.epoch or lease is None:
            return 0
        return await self._end(lease, LeaseEvent.RELEASED)

    async def abort(self, request_id: str) -> int:
        """Take back what is reserved for a request, its writer notwithstanding.

        Call before `engine.abort`: returns once no write can reach the blocks and they are free.
        Unknown ids: 0. A commit that is under way is waited for first.
        """
        lease = self._table.held_by(request_id)
        return 0 if lease is None else await self._end(lease, LeaseEvent.ABORTED)

    def sweep(self) -> None:
        """Revoke leases whose time is over and forget old ones; called every SWEEP_INTERVAL_S."""
        for lease in self._table.expire():
            logger.warning("lease expired request_id=%s owner=%s", lease.request_id, lease.owner)
            self._reclaim(lease)
        old = self._table.purge()
        for lease_id in old:
            self._endings.pop(lease_id).num_freed_blocks.cancel()
        if old:
            self._spawn(self._forget(old), "kv-forget")

    async def _end(self, lease: Lease, reason: LeaseEvent) -> int:
        ending = self._endings[lease.lease_id]
        if lease.state is LeaseState.COMMITTING:
            await asyncio.wait([ending.committed])
        is_waiting = lease.state is LeaseState.WAITING
        if self._table.revoke(lease, reason):
            if is_waiting:  # `reserve` reclaims it, as soon as the engine lets it go
                self._waits[lease.lease_id].reschedule(asyncio.get_running_loop().time())
            else:
                self._reclaim(lease)
        if lease.state is LeaseState.COMMITTED:
            return 0
        return await asyncio.shield(ending.num_freed_blocks)

    def _reclaim(self, lease: Lease) -> None:
        """Fence a lease that was just revoked and free its blocks, whoever waits for it or not."""
        self._arrivals.end(lease)
        self._spawn(self._free(lease), f"kv-free-{lease.request_id}")

    async def _free(self, lease: Lease) -> None:
        freed = self._endings[lease.lease_id].num_freed_blocks
        try:
            await self._group.fence(lease.lease_id)
            num_blocks = await self._engine.cancel_reservation(lease.request_id)
        except Exception as error:
            # The blocks stay in quarantine: this happens when the engine or a rank is dead.
            logger.exception("blocks not freed request_id=%s", lease.request_id)
            _fail(freed, error)
            return
        self._table.freed(lease)
        freed.set_result(num_blocks)

    async def _commit(self, lease: Lease, num_bytes: int, first_token_id: int) -> None:
        committed = self._endings[lease.lease_id].committed
        try:
            self._check_num_bytes(lease, num_bytes)
            await self._group.fence(lease.lease_id)
            await self._engine.commit(lease.request_id, first_token_id)
        except Exception as error:  # noqa: BLE001 - raised again where the future is awaited
            if isinstance(error, UnknownRequestError):
                error = KvLeaseLostError(f"the reservation is gone: {error}")
            self._table.revoke(lease, LeaseEvent.REFUSED)
            self._reclaim(lease)
            _fail(committed, error)
            return
        self._table.finish_commit(lease)
        self._arrivals.end(lease)
        self._num_committed_tokens += lease.num_tokens - lease.num_cached_tokens
        committed.set_result(None)

    def _check_num_bytes(self, lease: Lease, num_bytes: int) -> None:
        num_tokens = lease.num_tokens - lease.num_cached_tokens
        expected = num_handover_bytes(self.layout, num_tokens)
        if num_bytes != expected:
            raise InvalidRequestError(
                f"commit of {num_bytes} bytes where {num_tokens} tokens are {expected}"
            )

    async def _forget(self, lease_ids: Sequence[int]) -> None:
        try:
            await self._group.forget(lease_ids)
        except IsthmusError as error:
            logger.warning("leases not forgotten: %s", error)

    async def _wait_for_quarantine(self, request_id: str) -> None:
        """Blocks of an earlier try of the same request come back first."""
        lease = self._table.held_by(request_id)
        if lease is not None and lease.state is LeaseState.REVOKED:
            await asyncio.shield(self._endings[lease.lease_id].num_freed_blocks)

    async def _take_blocks(
        self, lease: Lease, block_hashes: Sequence[bytes], lease_s: float
    ) -> None:
        """Grant a lease what the engine gives; raises when it was aborted meanwhile."""
        wait = self._waits[lease.lease_id] = asyncio.timeout(None)
        try:
            async with wait:
                if self._shares_prefixes:
                    await self._arrivals.wait(lease.num_tokens, block_hashes)
                    self._arrivals.expect(lease, block_hashes)
                reservation = await self._engine.reserve(
                    lease.request_id, lease.num_tokens, block_hashes
                )
        except TimeoutError:
            if lease.state is LeaseState.WAITING:
                raise  # the engine's own
        finally:
            del self._waits[lease.lease_id]
        if lease.state is not LeaseState.WAITING:  # the abort may have come after the blocks
            raise UnknownRequestError(f"request {lease.request_id} was aborted")
        self._table.grant(
            lease,
            block_ids=reservation.block_ids,
            num_cached_tokens=reservation.num_cached_tokens,
            lease_s=lease_s,
        )

    def _check_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            raise KvLeaseLostError(
                f"epoch {epoch} is over: {self._receiver_id} has started again since"
            )

    def _spawn(self, work: Coroutine[object, object, None], name: str) -> asyncio.Task[None]:
        """Run `work`, which raises nothing, to its end: its caller may be cancelled meanwhile."""
        task = self._tasks.create_task(work, name=name)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task

    async def _sweep_for_ever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            self.sweep()

    def _abandon(self) -> None:
        """End every wait; the blocks go down with the engine."""
        for task in self._running:
            task.cancel()
        for ending in self._endings.values():
            ending.num_freed_blocks.cancel()
            ending.committed.cancel()


def _fail(future: asyncio.Future[T], error: Exception) -> None:
    future.set_exception(error)
    future.exception()  # nobody may be left to look at it
