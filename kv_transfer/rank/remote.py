"""A rank of this worker in another process, as rank 0 drives it in handovers."""

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from grpc import StatusCode, aio

from engine.errors import DeadlineError, RankDeadError
from kv_transfer import convert
from kv_transfer.blocks import SlotRange
from kv_transfer.offer import RankOffer
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.rank import convert as rank_convert
from kv_transfer.sending_rank import RankLink, Target
from mesh.status import ERROR_TRAILER, error_from_rpc
from protos.isthmus.v1 import kv_rank_pb2 as pb
from protos.isthmus.v1 import kv_rank_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

Req = TypeVar("Req")
Res = TypeVar("Res")


class RemoteRank:
    """Both a SendingRank and a ReceivingRank; an async context manager. Loop only.

    A rank that does not answer in time is as good as dead, but for a fence: that is asked for
    until it is answered, because the rank may go on later.
    """

    def __init__(
        self, rank: int, address: str, channel: aio.Channel, *, worker_id: str, timeout_s: float
    ) -> None:
        """Nothing is called before the first use.

        Args:
            rank: its number in the worker.
            address: of its `serving_rank`, for texts.
            channel: to that address; closed here.
            worker_id: whose rank it is, for texts.
            timeout_s: for each call but writes, which last as long as their lease.
        """
        self.rank = rank
        self.name = f"rank {rank} of {worker_id} ({address})"
        self._channel = channel
        self._stub = pb_grpc.KvRankServiceStub(channel)
        self._timeout_s = timeout_s
        self._write_ids = itertools.count(1)
        self._calls: set[aio.UnaryUnaryCall[Any, Any]] = set()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._channel.close()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Not known here; the rank logs each one."""
        return {}

    async def start(self, epoch: int) -> RankOffer:
        request = pb.StartReceivingRequest(epoch=epoch)
        return convert.rank_offer_from(await self._call(self._stub.StartReceiving, request))

    async def open(self, window: WriteWindow) -> None:
        await self._call(self._stub.OpenWindow, rank_convert.window_to_pb(window))

    async def fence(self, lease_id: int) -> None:
        request = pb.FenceRequest(lease_id=lease_id)
        while True:
            try:
                return await self.answer(self._stub.Fence(request, timeout=self._timeout_s))
            except DeadlineError:
                logger.warning("%s has not fenced lease %d yet", self.name, lease_id)

    async def forget(self, lease_ids: Sequence[int]) -> None:
        await self._call(self._stub.Forget, pb.ForgetRequest(lease_ids=lease_ids))

    async def stop(self) -> None:
        """Nothing: the rank closes its pool when its process ends."""

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        request = pb.OpenLinkRequest(targets=map(rank_convert.target_to_pb, targets))
        return RemoteLink(self, await self._call(self._stub.OpenLink, request))

    async def write(self, link_id: int, permit: WritePermit, parts: Sequence[SlotRange]) -> int:
        """As `RankLink.write`; what happens to the permit meanwhile is passed on."""
        permit.check()
        write_id = next(self._write_ids)
        request = pb.WriteRequest(
            link_id=link_id,
            write_id=write_id,
            lease_id=permit.lease_id,
            epoch=permit.epoch,
            lease_left_ns=_left_ns(permit),
            slots=rank_convert.slots_to_pb(parts),
        )

        def adjust() -> None:
            request = pb.AdjustWriteRequest(write_id=write_id, lease_left_ns=_left_ns(permit))
            self.post(self._stub.AdjustWrite(request, timeout=self._timeout_s))

        permit.on_change.add(adjust)
        try:
            response: pb.WriteResponse = await self.answer(self._stub.Write(request))
        finally:
            permit.on_change.discard(adjust)
        return response.num_bytes

    def close_link(self, link_id: int) -> None:
        request = pb.CloseLinkRequest(link_id=link_id)
        self.post(self._stub.CloseLink(request, timeout=self._timeout_s))

    def post(self, call: "aio.UnaryUnaryCall[Any, Any]") -> None:
        """Nobody waits for this call; should it fail, so do those that somebody waits for."""
        self._calls.add(call)
        call.add_done_callback(lambda _: self._calls.discard(call))

    async def answer(self, call: Awaitable[Res]) -> Res:
        """Raises what the rank's servicer raised, or RankDeadError when there was no answer.

        Raises:
            DeadlineError: none came in the time that the call was given.
        """
        try:
            return await call
        except aio.AioRpcError as error:
            trailers = error.trailing_metadata() or ()
            has_said_so = any(key == ERROR_TRAILER for key, _ in trailers)
            if has_said_so or error.code() is StatusCode.DEADLINE_EXCEEDED:
                raise error_from_rpc(error) from error
            raise RankDeadError(
                f"{self.name} is gone: {error.details()}", rank=self.rank, operation="kv handover"
            ) from error

    async def _call(
        self, method: Callable[..., "aio.UnaryUnaryCall[Req, Res]"], request: Req
    ) -> Res:
        try:
            return await self.answer(method(request, timeout=self._timeout_s))
        except DeadlineError as error:
            raise RankDeadError(
                f"{self.name} does not answer: no reply within {self._timeout_s} s",
                rank=self.rank,
                operation="kv handover",
            ) from error


class RemoteLink:
    """A link that another rank of this worker holds."""

    def __init__(self, rank: RemoteRank, opened: pb.OpenLinkResponse) -> None:
        self.data_planes: Sequence[str] = list(opened.data_planes)
        self.fallback_reasons: Sequence[str] = list(opened.fallback_reasons)
        self._rank = rank
        self._link_id = opened.link_id

    def write(self, permit: WritePermit, parts: Sequence[SlotRange]) -> asyncio.Future[int]:
        # Held and waited for by the handover, which is why no task group holds it here.
        return asyncio.ensure_future(self._rank.write(self._link_id, permit, parts))

    def close(self) -> None:
        self._rank.close_link(self._link_id)


def _left_ns(permit: WritePermit) -> int:
    """What is left of the lease; 0 when it is over or was stopped."""
    if permit.stopped.is_set():
        return 0
    left_s = permit.deadline_s - permit.clock()
    return round(left_s * 1e9) if left_s > 0 else 0
