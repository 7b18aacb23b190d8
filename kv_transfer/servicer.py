"""isthmus.v1.KvTransferService: the control calls of a handover, on the decode worker."""

from grpc import aio

from kv_transfer import convert
from kv_transfer.receiver import KvReceiver
from protos.isthmus.v1 import kv_transfer_pb2 as pb
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc


class KvTransferServicer(pb_grpc.KvTransferServiceServicer):
    """Translates; `KvReceiver` decides. Serve it behind `mesh.status.StatusInterceptor`."""

    def __init__(self, receiver: KvReceiver) -> None:
        self._receiver = receiver

    async def Handshake(
        self,
        request: pb.HandshakeRequest,
        context: aio.ServicerContext[pb.HandshakeRequest, pb.HandshakeResponse],
    ) -> pb.HandshakeResponse:
        offer = self._receiver.handshake(
            sender_id=request.sender_id,
            layout=convert.layout_from(request.layout),
            model_digest=request.model_digest,
            protocol_version=request.protocol_version,
        )
        return convert.offer_to_pb(offer)

    async def Reserve(
        self,
        request: pb.ReserveRequest,
        context: aio.ServicerContext[pb.ReserveRequest, pb.ReserveResponse],
    ) -> pb.ReserveResponse:
        lease = await self._receiver.reserve(
            request.request_id,
            owner=context.peer(),
            epoch=request.epoch,
            num_tokens=request.num_tokens,
            block_hashes=convert.block_hashes_from(
                request, self._receiver.layout.block_size_tokens
            ),
            lease_s=convert.lease_s_from(request.lease_ns),
        )
        return convert.lease_to_pb(lease)

    async def Renew(
        self,
        request: pb.RenewRequest,
        context: aio.ServicerContext[pb.RenewRequest, pb.RenewResponse],
    ) -> pb.RenewResponse:
        lost = self._receiver.renew(
            request.epoch, request.lease_ids, convert.lease_s_from(request.lease_ns)
        )
        return pb.RenewResponse(lost_lease_ids=lost)

    async def Commit(
        self,
        request: pb.CommitRequest,
        context: aio.ServicerContext[pb.CommitRequest, pb.CommitResponse],
    ) -> pb.CommitResponse:
        await self._receiver.commit(
            request.epoch,
            request.lease_id,
            num_bytes=request.num_bytes,
            first_token_id=request.first_token_id,
        )
        return pb.CommitResponse()

    async def Release(
        self,
        request: pb.ReleaseRequest,
        context: aio.ServicerContext[pb.ReleaseRequest, pb.ReleaseResponse],
    ) -> pb.ReleaseResponse:
        receiver = self._receiver
        if request.lease_id:
            num_blocks = await receiver.release(request.epoch, request.lease_id)
        else:
            num_blocks = await receiver.withdraw(request.epoch, request.request_id)
        return pb.ReleaseResponse(num_freed_blocks=num_blocks)
