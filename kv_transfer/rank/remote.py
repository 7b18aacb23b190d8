"""A rank of this worker in another process, as rank 0 drives it in handovers."""

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from grpc import StatusCode, aio

from engine.errors import DeadlineError, RankDeadError
from kv_transfer import convert
from kv_transfer.config import address_from
from kv_transfer.offer import RankOffer
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.rank import convert as rank_convert
from kv_transfer.sending_rank import RankLink, Target, Written
from kv_transfer.slot_ranges import SlotRange
from mesh.status import ERROR_TRAILER, error_from_rpc
from protos.isthmus.v1 import kv_rank_pb2 as pb
from protos.isthmus.v1 import kv_rank_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

Res = TypeVar("Res")

RECONNECT_S = 1.0
"""A rank that takes no connection for this long is dead."""


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
            timeout_s: for each call; writes have it beyond their lease.
        """
        self.rank = rank
        self.address = address
        self.name = f"rank {rank} of {worker_id} ({address})"
        self._channel = channel
        self._stub = pb_grpc.KvRankServiceStub(channel)
        self._timeout_s = timeout_s
        self._write_ids = itertools.count(1)
        self._dropped: Counter[str] = Counter()
        self._calls: set[aio.UnaryUnaryCall[Any, Any]] = set()

    async def __aenter__(self) -> Self:
        """Raises RankDeadError when the rank cannot be reached."""
        if not await self._is_connected(self._timeout_s):
            await self._channel.close()
            raise self._dead("cannot be reached")
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
        """As of the last lease that ended."""
        return self._dropped

    async def start(self, epoch: int) -> RankOffer:
        request = pb.StartReceivingRequest(epoch=epoch)
        timeout_s = self._timeout_s
        response = await self._call(lambda: self._stub.StartReceiving(request, timeout=timeout_s))
        # Others know rank 0's host, not this rank's.
        return convert.rank_offer_from(response).at_host(address_from(self.address)[0])

    async def open(self, window: WriteWindow) -> None:
        request = rank_convert.window_to_pb(window)
        await self._call(lambda: self._stub.OpenWindow(request, timeout=self._timeout_s))

    async def fence(self, lease_id: int) -> None:
        request = pb.FenceRequest(lease_id=lease_id)
        while True:
            try:
                response = await self._reach(
                    lambda: self._stub.Fence(request, timeout=self._timeout_s)
                )
            except DeadlineError:
                logger.warning("%s has not fenced lease %d yet", self.name, lease_id)
            else:
                self._dropped |= Counter(response.dropped_connections)  # none of them ever falls
                return

    async def forget(self, lease_ids: Sequence[int]) -> None:
        request = pb.ForgetRequest(lease_ids=lease_ids)
        await self._call(lambda: self._stub.Forget(request, timeout=self._timeout_s))

    async def stop(self) -> None:
        """Nothing: the rank closes its pool when its process ends."""

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        request = pb.OpenLinkRequest(targets=map(rank_convert.target_to_pb, targets))
        timeout_s = self._timeout_s
        response = await self._call(lambda: self._stub.OpenLink(request, timeout=timeout_s))
        return RemoteLink(self, response)

    async def write(
        self, link_id: int, permit: WritePermit, parts: Sequence[SlotRange], step: int | None
    ) -> Written:
        """As `RankLink.write`; what happens to the permit meanwhile is passed on.

        A rank that is still silent when the permit has been over for as long as a call may take is
        dead: what it may yet write, the receiver's fence keeps out.
        """
        permit.check()
        write_id = 0
        loop = asyncio.get_running_loop()

        def last_answer_s() -> float:
            return loop.time() + _left_ns(permit) / 1e9 + self._timeout_s

        def make() -> "aio.UnaryUnaryCall[pb.WriteRequest, pb.WriteResponse]":
            nonlocal write_id
            write_id = next(self._write_ids)
            request = pb.WriteRequest(
                link_id=link_id,
                write_id=write_id,
                lease_id=permit.lease_id,
                epoch=permit.epoch,
                lease_left_ns=_left_ns(permit),
                slots=rank_convert.slots_to_pb(parts),
                step=step or 0,
            )
            call: aio.UnaryUnaryCall[pb.WriteRequest, pb.WriteResponse] = self._stub.Write(request)
            return call

        def adjust() -> None:
            request = pb.AdjustWriteRequest(write_id=write_id, lease_left_ns=_left_ns(permit))
            self._post(self._stub.AdjustWrite(request, timeout=self._timeout_s))
            if not waiting.expired():
                waiting.reschedule(last_answer_s())

        waiting = asyncio.timeout_at(last_answer_s())
        try:
            async with waiting:
                permit.on_change.add(adjust)
                response = await self._call(make)
                return Written(response.num_bytes, response.write_ns)
        except TimeoutError as error:
            raise self._dead("does not answer: it neither wrote nor stopped") from error
        finally:
            permit.on_change.discard(adjust)

    def close_link(self, link_id: int) -> None:
        request = pb.CloseLinkRequest(link_id=link_id)
        self._post(self._stub.CloseLink(request, timeout=self._timeout_s))

    def _post(self, call: "aio.UnaryUnaryCall[Any, Any]") -> None:
        """Nobody waits for this call; should it fail, so do those that somebody waits for."""
        self._calls.add(call)
        call.add_done_callback(lambda _: self._calls.discard(call))

    async def _call(self, make: Callable[[], "aio.UnaryUnaryCall[Any, Res]"]) -> Res:
        """Raises what the rank's servicer raised, or RankDeadError when there is no answer."""
        try:
            return await self._reach(make)
        except DeadlineError as error:
            raise self._dead(f"does not answer: no reply within {self._timeout_s} s") from error

    async def _reach(self, make: Callable[[], "aio.UnaryUnaryCall[Any, Res]"]) -> Res:
        """As `_call`, but raises DeadlineError when the call's time was not enough."""
        try:
            return await make()
        except aio.AioRpcError as error:
            if _has_answered(error):
                raise error_from_rpc(error) from error
            reason = error.details()
        # A connection may be cut, or not made in time on a busy host; a live rank takes the next.
        if not await self._is_connected(RECONNECT_S):
            raise self._dead(f"is gone: {reason}")
        try:
            return await make()
        except aio.AioRpcError as error:
            if _has_answered(error):
                raise error_from_rpc(error) from error
            raise self._dead(f"is gone: {error.details()}") from error

    async def _is_connected(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                await self._channel.channel_ready()
        except TimeoutError:
            return False
        return True

    def _dead(self, text: str) -> RankDeadError:
        return RankDeadError(f"{self.name} {text}", rank=self.rank, operation="kv handover")


def _has_answered(error: aio.AioRpcError) -> bool:
    """The rank's servicer raised this, or had no time to."""
    trailers = error.trailing_metadata() or ()
    is_late = error.code() is StatusCode.DEADLINE_EXCEEDED
    return is_late or any(key == ERROR_TRAILER for key, _ in trailers)


class RemoteLink:
    """A link that another rank of this worker holds."""

    def __init__(self, rank: RemoteRank, opened: pb.OpenLinkResponse) -> None:
        self.data_planes: Sequence[str] = list(opened.data_planes)
        self.fallback_reasons: Sequence[str] = list(opened.fallback_reasons)
        self._rank = rank
        self._link_id = opened.link_id

    def write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None = None
    ) -> asyncio.Future[Written]:
        # Held and waited for by the handover, which is why no task group holds it here.
        return asyncio.ensure_future(self._rank.write(self._link_id, permit, parts, step))

    def close(self) -> None:
        self._rank.close_link(self._link_id)


def _left_ns(permit: WritePermit) -> int:
    """What is left of the lease; 0 when it is over or was stopped."""
    if permit.stopped.is_set():
        return 0
    left_s = permit.deadline_s - permit.clock()
    return round(left_s * 1e9) if left_s > 0 else 0
