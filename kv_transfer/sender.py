"""The prefill worker's end of handovers."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self

from grpc import aio

from engine.errors import (
    IsthmusError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
)
from engine.scheduling.data_shard import data_shard_of
from kv_transfer import convert
from kv_transfer.config import TransferConfig
from kv_transfer.counters import SenderCounters
from kv_transfer.handover import Handover
from kv_transfer.offer import PROTOCOL_VERSION, Offer
from kv_transfer.peer import Peer
from kv_transfer.plane import WritePermit
from kv_transfer.report import HandoverReport
from kv_transfer.sending_group import SendingGroup
from kv_transfer.session import Session, outcome_of
from kv_transfer.together import to_its_end
from protos.isthmus.v1 import kv_transfer_pb2 as pb

logger = logging.getLogger(__name__)

RENEWALS_PER_LEASE = 4
HashBlocks = Callable[[int], Sequence[bytes]]


def _no_hashes(block_size_tokens: int) -> Sequence[bytes]:
    return ()


class KvSender:
    """Hands KV of a worker's ranks to decode workers. An async context manager; loop only."""

    def __init__(
        self,
        group: SendingGroup,
        *,
        sender_id: str,
        model_digest: str,
        open_channel: Callable[[str], aio.Channel],
        config: TransferConfig,
        clock: Callable[[], float] = time.monotonic,
        on_end: Callable[[HandoverReport], None] = lambda report: None,
    ) -> None:
        """Nothing is opened before the first handover.

        Args:
            group: the ranks whose pools are read from.
            sender_id: this worker, in the receiver's logs.
            model_digest: what the weights were read from; must be the receiver's.
            open_channel: a channel to an address; it is closed here.
            config: see there.
            clock: monotonic seconds, for leases.
            on_end: told about each handover that ended, committed or not.
        """
        self._group = group
        self._open_channel = open_channel
        self._config = config
        self._clock = clock
        self._on_end = on_end
        self._greeting = pb.HandshakeRequest(
            sender_id=sender_id,
            layout=convert.layout_to_pb(group.layout.full),
            model_digest=model_digest,
            protocol_version=PROTOCOL_VERSION,
        )
        self._peers: dict[str, Peer] = {}
        self._handovers: dict[Handover, None] = {}  # in order of arrival
        self._closing: set[asyncio.Task[None]] = set()
        self._num_bytes: Counter[str] = Counter()
        self._num_tokens: Counter[str] = Counter()
        self._write_ns: Counter[str] = Counter()
        self._outcomes: Counter[str] = Counter()
        self._retransfers: Counter[str] = Counter()
        self._fallbacks: Counter[str] = Counter()
        self._stack = AsyncExitStack()
        self._tasks = asyncio.TaskGroup()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._close_peers)
            await stack.enter_async_context(self._tasks)
            renewer = self._tasks.create_task(self._renew_for_ever(), name="kv-lease-renewer")
            stack.callback(renewer.cancel)
            stack.push_async_callback(self._close_handovers)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes what is open."""
        await self._stack.__aexit__(kind, error, traceback)

    @property
    def counters(self) -> SenderCounters:
        """A snapshot; any thread may take it."""
        return SenderCounters(
            num_open_handovers=len(self._handovers),
            num_bytes=dict(self._num_bytes),
            num_tokens=dict(self._num_tokens),
            write_s={name: ns / 1e9 for name, ns in dict(self._write_ns).items()},
            handovers=dict(self._outcomes),
            retransfers=dict(self._retransfers),
            fallbacks=dict(self._fallbacks),
        )

    @asynccontextmanager
    async def handover(
        self,
        request_id: str,
        *,
        decode_address: str,
        num_tokens: int,
        hash_blocks: HashBlocks = _no_hashes,
    ) -> AsyncIterator[Handover]:
        """A handover inside the block; leaving it without a commit gives the blocks back."""
        handover = await self.open(
            request_id,
            decode_address=decode_address,
            num_tokens=num_tokens,
            hash_blocks=hash_blocks,
        )
        try:
            yield handover
        except BaseException as error:
            handover.fail(error)
            raise
        finally:
            await self.close(handover)

    async def open(
        self,
        request_id: str,
        *,
        decode_address: str,
        num_tokens: int,
        hash_blocks: HashBlocks = _no_hashes,
    ) -> Handover:
        """Reserve blocks for `num_tokens` tokens; waits while the receiver's pool is full.

        The caller must `close` what it gets. Cancelling gives up the place in the queue.

        Args:
            request_id: the id under which the receiver's engine knows the sequence.
            decode_address: host:port of the receiver's gRPC server.
            num_tokens: tokens whose KV will be pushed, the receiver's cached prefix included.
            hash_blocks: called with the receiver's block size in tokens, gives the hashes of the
                prompt's full blocks, by which the receiver finds that prefix.

        Raises:
            PeerUnavailableError, NotReadyError: another decode worker may do.
            CapacityError, DeadlineError: no blocks, ever or in time.
            DuplicateRequestError: blocks are reserved under this id.
            UnknownRequestError: the request was aborted on the receiver meanwhile.
            LayoutMismatchError: both ends differ.
        """
        report = HandoverReport(reserve_start_ns=time.time_ns())
        request = pb.ReserveRequest(
            request_id=request_id,
            num_tokens=num_tokens,
            lease_ns=round(self._config.lease_s * 1e9),
        )
        peer = self._enter_peer(decode_address)
        try:
            handover = await self._reserve(peer, request, hash_blocks, report)
        except BaseException as error:
            await self._leave_peer(peer)
            report.outcome = outcome_of(error)
            self._count(report)
            raise
        self._handovers[handover] = None
        if handover.is_late:  # the pool was full: time went by in the queue
            try:
                await self._renew(peer, handover.session)
            except BaseException:
                await self.close(handover)
                raise
        return handover

    async def close(self, handover: Handover) -> None:
        """End a handover: acknowledged when it was not committed. Repeating it is harmless.

        A caller that is cancelled waits all the same: the blocks that it is going to free are read
        until then.
        """
        if handover not in self._handovers:
            return
        del self._handovers[handover]
        # Not a task of the group: what was reserved while this sender ends is given back, too.
        closing = asyncio.create_task(self._close(handover), name="kv-close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        await to_its_end(closing)

    async def renew_leases(self) -> None:
        """Extend every open handover now; called RENEWALS_PER_LEASE times a lease."""
        sessions = {handover.session: handover.peer for handover in self._handovers}
        async with asyncio.TaskGroup() as group:
            for session, peer in sessions.items():
                group.create_task(self._renew(peer, session), name=f"kv-renew-{peer.address}")

    async def _reserve(
        self,
        peer: Peer,
        request: pb.ReserveRequest,
        hash_blocks: HashBlocks,
        report: HandoverReport,
    ) -> Handover:
        """Handshake where needed and reserve, twice when the peer turns out to have restarted."""
        session, is_new = await self._enter_session(peer, report)
        try:
            return await self._reserve_in(peer, session, request, hash_blocks, report)
        except (KvLeaseLostError, PeerUnavailableError):
            peer.forget(session)
            session.leave()
            if is_new:
                raise
        except BaseException:
            session.leave()
            raise
        session, _ = await self._enter_session(peer, report)
        try:
            return await self._reserve_in(peer, session, request, hash_blocks, report)
        except BaseException:
            session.leave()
            raise

    async def _enter_session(self, peer: Peer, report: HandoverReport) -> tuple[Session, bool]:
        session, is_new = await peer.enter_session()
        if is_new:
            report.num_handshakes += 1
            self._fallbacks.update(session.fallback_reasons)
        return session, is_new

    async def _reserve_in(
        self,
        peer: Peer,
        session: Session,
        request: pb.ReserveRequest,
        hash_blocks: HashBlocks,
        report: HandoverReport,
    ) -> Handover:
        request.epoch = session.offer.epoch
        request.block_hashes[:] = hash_blocks(session.offer.layout.block_size_tokens)
        sent_s = self._clock()
        response = await peer.reserve(request, self._config.reserve_timeout_s)
        check_grant(response, request.num_tokens, session.offer)
        lease_s = response.lease_ns / 1e9
        session.lease_s = min(session.lease_s, lease_s)
        permit = WritePermit(response.lease_id, session.offer.epoch, self._clock, sent_s + lease_s)
        report.reserve_end_ns = time.time_ns()
        report.data_plane = session.data_plane
        report.num_cached_tokens = response.num_cached_tokens
        return Handover(
            request.request_id,
            peer,
            session,
            permit,
            block_ids=response.block_ids,
            num_cached_tokens=response.num_cached_tokens,
            num_tokens=request.num_tokens,
            layout=self._group.layout,
            num_blocks=self._group.num_blocks,
            report=report,
            rpc_timeout_s=self._config.rpc_timeout_s,
        )

    async def _close(self, handover: Handover) -> None:
        try:
            await handover.close()
            if handover.report.outcome == "open":
                handover.report.outcome = "released"
            self._count(handover.report)
            await self._leave_peer(handover.peer)
        except Exception:
            logger.exception("handover not closed request_id=%s", handover.request_id)

    async def _close_handovers(self) -> None:
        for handover in list(self._handovers):
            await self.close(handover)
        if self._closing:
            await asyncio.wait(self._closing)

    def _count(self, report: HandoverReport) -> None:
        self._outcomes[report.outcome] += 1
        self._retransfers.update(report.retransfers)
        if report.outcome == "committed":
            self._num_tokens["sent"] += report.num_tokens
            self._num_tokens["held"] += report.num_cached_tokens
        if report.num_bytes:
            self._num_bytes[report.data_plane] += report.num_bytes
            self._write_ns[report.data_plane] += report.write_ns
        self._on_end(report)

    async def _renew_for_ever(self) -> None:
        while True:
            leases_s = [handover.session.lease_s for handover in self._handovers]
            await asyncio.sleep(min(leases_s, default=self._config.lease_s) / RENEWALS_PER_LEASE)
            await self.renew_leases()
            await self._drop_gone_peers()

    async def _drop_gone_peers(self) -> None:
        """The memory of a worker that is gone lives on as long as it is mapped here."""
        gone = [p for p in self._peers.values() if not p.num_users and not p.is_connected]
        for peer in gone:
            logger.info("forgetting a worker that is gone address=%s", peer.address)
            del self._peers[peer.address]
            await peer.close()

    async def _renew(self, peer: Peer, session: Session) -> None:
        try:
            await peer.renew(session, timeout_s=session.lease_s / RENEWALS_PER_LEASE)
        except IsthmusError as error:  # the deadlines stand; the next round may get through
            logger.warning("leases not renewed address=%s: %s", peer.address, error)

    def _enter_peer(self, address: str) -> Peer:
        peer = self._peers.get(address)
        if peer is None:
            peer = self._peers[address] = Peer(
                address,
                self._open_channel(address),
                greeting=self._greeting,
                config=self._config,
                open_links=lambda offer, address: self._group.open_links(
                    offer, peer_address=address
                ),
            )
        peer.num_users += 1
        return peer

    async def _leave_peer(self, peer: Peer) -> None:
        """Workers come and go: nothing is kept for one that nobody uses and that is not known."""
        peer.num_users -= 1
        if peer.num_users == 0 and not peer.has_session and peer.address in self._peers:
            del self._peers[peer.address]
            await peer.close()

    async def _close_peers(self) -> None:
        for peer in self._peers.values():
            await peer.close()
        self._peers.clear()


def check_grant(response: pb.ReserveResponse, num_tokens: int, offer: Offer) -> None:
    """Raises LayoutMismatchError for an answer that no receiver of this protocol gives."""
    block_ids = response.block_ids
    is_sound = (
        0 < response.lease_id < 1 << 62
        and len(block_ids) == len(set(block_ids)) == offer.layout.num_blocks_for(num_tokens)
        and max(block_ids) < offer.num_blocks * offer.layout.num_data_shards
        and len({data_shard_of(block_id, offer.num_blocks) for block_id in block_ids}) == 1
        and response.num_cached_tokens <= num_tokens
        and response.lease_ns > 0
    )
    if not is_sound:
        raise LayoutMismatchError(
            f"{offer.receiver_id} granted {len(block_ids)} blocks and"
            f" {response.num_cached_tokens} cached tokens for {num_tokens} tokens"
        )
