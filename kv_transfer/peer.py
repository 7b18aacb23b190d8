"""A sender's acquaintance with one decode worker: a channel, a session with its last start."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from grpc import ChannelConnectivity, aio

from engine.errors import (
    DeadlineError,
    EngineDeadError,
    IsthmusError,
    KvLeaseLostError,
    PeerUnavailableError,
)
from kv_transfer import convert
from kv_transfer.config import TransferConfig
from kv_transfer.offer import PROTOCOL_VERSION, Offer, check_same
from kv_transfer.sending_group import ShardLink
from kv_transfer.session import Session
from kv_transfer.together import to_its_end
from mesh.status import error_from_rpc
from protos.isthmus.v1 import kv_transfer_pb2 as pb
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

Req = TypeVar("Req")
Res = TypeVar("Res")


class Peer:
    """Handshakes once for each start of the worker. Loop only."""

    def __init__(
        self,
        address: str,
        channel: aio.Channel,
        *,
        greeting: pb.HandshakeRequest,
        config: TransferConfig,
        open_links: Callable[[Offer, str], Awaitable[Sequence[ShardLink]]],
    ) -> None:
        self.address = address
        self.num_users = 0
        self._channel = channel
        self.calls = pb_grpc.KvTransferServiceStub(channel)
        self._greeting = greeting
        self._config = config
        self._open_links = open_links
        self._session: Session | None = None
        self._lock = asyncio.Lock()

    @property
    def has_session(self) -> bool:
        return self._session is not None

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the worker at this moment."""
        return self._channel.get_state() is ChannelConnectivity.READY

    async def enter_session(self) -> tuple[Session, bool]:
        """The session, entered, and whether it is new.

        Raises:
            LayoutMismatchError: both ends differ, or have no data plane in common.
            PeerUnavailableError: the worker cannot be reached.
            RankDeadError: a rank of the worker here is gone.
        """
        async with self._lock:
            is_new = self._session is None
            if self._session is None:
                offer = await self._handshake()
                links = await self._open_links(offer, self.address)
                self._session = Session(offer, links, lease_s=self._config.lease_s)
                logger.info(
                    "handshake receiver_id=%s address=%s ranks=%d data_plane=%s",
                    offer.receiver_id,
                    self.address,
                    len(offer.ranks),
                    self._session.data_plane,
                )
            self._session.enter()
            return self._session, is_new

    def forget(self, session: Session) -> None:
        """The worker has started again or is gone: the next handover handshakes anew."""
        if self._session is session:
            self._session = None
            session.leave()

    async def call(
        self, method: Callable[..., "aio.UnaryUnaryCall[Req, Res]"], request: Req, timeout_s: float
    ) -> Res:
        """Call the worker; raises what its servicer raised, as `_error_of_peer` has it."""
        try:
            return await method(request, timeout=timeout_s)
        except aio.AioRpcError as error:
            raise _error_of_peer(error) from error

    async def reserve(self, request: pb.ReserveRequest, timeout_s: float) -> pb.ReserveResponse:
        """Take blocks; where nobody can tell whether they were granted, they are given back."""
        try:
            return await self.call(self.calls.Reserve, request, timeout_s)
        except (asyncio.CancelledError, PeerUnavailableError, DeadlineError):
            release = pb.ReleaseRequest(epoch=request.epoch, request_id=request.request_id)
            await to_its_end(self._release(release))
            raise

    async def release(self, epoch: int, lease_id: int) -> None:
        """Give a lease back; nothing is written under it any more.

        Without an answer the receiver frees the blocks when the lease ends.
        """
        await self._release(pb.ReleaseRequest(epoch=epoch, lease_id=lease_id))

    async def renew(self, session: Session, *, timeout_s: float) -> None:
        """Extend every open handover of a session; those that are lost may write no more."""
        permits = dict(session.permits)
        if not permits:
            return
        lease_s = session.lease_s
        clock = next(iter(permits.values())).clock
        sent_s = clock()
        request = pb.RenewRequest(
            epoch=session.offer.epoch, lease_ids=list(permits), lease_ns=round(lease_s * 1e9)
        )
        try:
            response = await self.call(self.calls.Renew, request, timeout_s)
            lost = set(response.lost_lease_ids)
        except KvLeaseLostError:
            lost = set(permits)
            self.forget(session)
        for lease_id, permit in permits.items():
            if lease_id in lost:
                permit.move(float("-inf"))
            else:
                permit.move(max(permit.deadline_s, sent_s + lease_s))

    async def close(self) -> None:
        if self._session is not None:
            self.forget(self._session)
        await self._channel.close()

    async def _release(self, request: pb.ReleaseRequest) -> None:
        try:
            await self.call(self.calls.Release, request, self._config.rpc_timeout_s)
        except IsthmusError as error:
            logger.warning("release failed address=%s: %s", self.address, error)

    async def _handshake(self) -> Offer:
        response = await self.call(self.calls.Handshake, self._greeting, self._config.rpc_timeout_s)
        offer = convert.offer_from(response)
        greeting = self._greeting
        check_same(
            (PROTOCOL_VERSION, greeting.model_digest, offer.layout.full),
            (PROTOCOL_VERSION, greeting.model_digest, convert.layout_from(greeting.layout)),
            names=(offer.receiver_id, greeting.sender_id),
        )
        return offer


def _error_of_peer(error: aio.AioRpcError) -> IsthmusError:
    """What the worker raised; that its engine or a rank of it is dead means that it is gone."""
    known = error_from_rpc(error)
    return PeerUnavailableError(str(known)) if isinstance(known, EngineDeadError) else known
