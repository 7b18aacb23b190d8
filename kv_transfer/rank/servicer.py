"""isthmus.v1.KvRankService: a rank without a scheduler takes part in its worker's handovers."""

import itertools
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from grpc import aio

from engine.errors import InvalidRequestError, KvLeaseLostError
from kv_transfer import convert
from kv_transfer.config import TransferConfig
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.memory import KvMemory
from kv_transfer.plane import WritePermit, WriteStoppedError
from kv_transfer.rank import convert as rank_convert
from kv_transfer.sending_rank import RankLink, Target
from mesh.server import listening
from protos.isthmus.v1 import kv_rank_pb2 as pb
from protos.isthmus.v1 import kv_rank_pb2_grpc as pb_grpc

SERVICE_NAME = "isthmus.v1.KvRankService"


@dataclass(frozen=True, slots=True)
class _OpenLink:
    link: RankLink
    targets: list[Target]


class KvRankServicer(pb_grpc.KvRankServiceServicer):
    """Drives the local rank for rank 0. Serve it behind `mesh.status.StatusInterceptor`."""

    def __init__(self, memory: KvMemory, config: TransferConfig) -> None:
        self._memory = memory
        self._receiving = LocalReceivingRank(memory, config)
        self._sending = LocalSendingRank(memory, config)
        self._started: tuple[int, pb.StartReceivingResponse] | None = None
        self._links: dict[int, _OpenLink] = {}
        self._link_ids = itertools.count(1)
        self._permits: dict[int, WritePermit] = {}

    async def close(self) -> None:
        """Let nothing in any more and write nothing; the server has stopped."""
        for permit in self._permits.values():
            permit.stop()
        for opened in self._links.values():
            opened.link.close()
        self._links.clear()
        await self._receiving.stop()

    async def StartReceiving(
        self,
        request: pb.StartReceivingRequest,
        context: aio.ServicerContext[pb.StartReceivingRequest, pb.StartReceivingResponse],
    ) -> pb.StartReceivingResponse:
        if self._started is None:
            try:
                offer = await self._receiving.start(request.epoch)
            except (OSError, ValueError) as error:
                raise InvalidRequestError(f"no data plane: {error}") from error
            response = pb.StartReceivingResponse(
                shm=convert.shm_to_pb(offer),
                tcp=convert.tcp_to_pb(offer),
                nixl=convert.nixl_to_pb(offer),
            )
            self._started = request.epoch, response
        epoch, response = self._started
        if epoch != request.epoch:
            raise InvalidRequestError(f"this rank serves epoch {epoch}, not {request.epoch}")
        return response

    async def OpenWindow(
        self,
        request: pb.OpenWindowRequest,
        context: aio.ServicerContext[pb.OpenWindowRequest, pb.OpenWindowResponse],
    ) -> pb.OpenWindowResponse:
        await self._receiving.open(rank_convert.window_from(request, self._memory))
        return pb.OpenWindowResponse()

    async def Fence(
        self,
        request: pb.FenceRequest,
        context: aio.ServicerContext[pb.FenceRequest, pb.FenceResponse],
    ) -> pb.FenceResponse:
        await self._receiving.fence(rank_convert.lease_id_from(request.lease_id))
        return pb.FenceResponse(dropped_connections=self._receiving.dropped)

    async def Forget(
        self,
        request: pb.ForgetRequest,
        context: aio.ServicerContext[pb.ForgetRequest, pb.ForgetResponse],
    ) -> pb.ForgetResponse:
        await self._receiving.forget([rank_convert.lease_id_from(id_) for id_ in request.lease_ids])
        return pb.ForgetResponse()

    async def OpenLink(
        self,
        request: pb.OpenLinkRequest,
        context: aio.ServicerContext[pb.OpenLinkRequest, pb.OpenLinkResponse],
    ) -> pb.OpenLinkResponse:
        layout = self._memory.layout
        targets = [rank_convert.target_from(target, layout) for target in request.targets]
        if not targets:
            raise InvalidRequestError("a link needs a target")
        link = await self._sending.open_link(targets)
        link_id = next(self._link_ids)
        self._links[link_id] = _OpenLink(link, targets)
        return pb.OpenLinkResponse(
            link_id=link_id, data_planes=link.data_planes, fallback_reasons=link.fallback_reasons
        )

    async def Write(
        self,
        request: pb.WriteRequest,
        context: aio.ServicerContext[pb.WriteRequest, pb.WriteResponse],
    ) -> pb.WriteResponse:
        opened = self._links.get(request.link_id)
        if opened is None or request.write_id in self._permits:
            raise InvalidRequestError(f"link {request.link_id}, write {request.write_id}")
        parts = rank_convert.slots_from(request.slots, self._memory, opened.targets)
        permit = WritePermit(
            rank_convert.lease_id_from(request.lease_id),
            request.epoch,
            time.monotonic,
            time.monotonic() + request.lease_left_ns / 1e9,
        )
        self._permits[request.write_id] = permit
        try:
            written = await opened.link.write(permit, parts, request.step or None)
        except WriteStoppedError as error:
            raise KvLeaseLostError(str(error)) from error
        finally:
            permit.stop()  # should rank 0 be gone, the thread still writes
            del self._permits[request.write_id]
        return pb.WriteResponse(num_bytes=written.num_bytes, write_ns=written.write_ns)

    async def AdjustWrite(
        self,
        request: pb.AdjustWriteRequest,
        context: aio.ServicerContext[pb.AdjustWriteRequest, pb.AdjustWriteResponse],
    ) -> pb.AdjustWriteResponse:
        permit = self._permits.get(request.write_id)
        if permit is not None and request.lease_left_ns == 0:
            permit.stop()
        elif permit is not None:
            permit.move(time.monotonic() + request.lease_left_ns / 1e9)
        return pb.AdjustWriteResponse()

    async def CloseLink(
        self,
        request: pb.CloseLinkRequest,
        context: aio.ServicerContext[pb.CloseLinkRequest, pb.CloseLinkResponse],
    ) -> pb.CloseLinkResponse:
        opened = self._links.pop(request.link_id, None)
        if opened is not None:
            opened.link.close()
        return pb.CloseLinkResponse()


@asynccontextmanager
async def serving_rank(
    memory: KvMemory, config: TransferConfig, *, address: str = "127.0.0.1:0"
) -> AsyncIterator[int]:
    """Serve a follower rank's pool to its rank 0 inside the block; yields the bound port.

    Only rank 0 shall know the address: whoever calls here may write into the pool.

    Raises:
        ValueError: the address cannot be bound; the text names it.
    """
    servicer = KvRankServicer(memory, config)

    def add(server: aio.Server) -> None:
        pb_grpc.add_KvRankServiceServicer_to_server(servicer, server)

    try:
        async with listening(
            add, address=address, drain_grace_s=0, service_names=[SERVICE_NAME]
        ) as port:
            yield port
    finally:
        await servicer.close()
