"""isthmus.v1.KvStoreService: what is here, and handing it over to who asks."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from grpc import aio

from engine.errors import InvalidRequestError, LayoutMismatchError, PeerUnavailableError
from engine.scheduling.block_hash import HASH_BYTES
from kv_transfer.sender import KvSender
from kv_transfer.store.block_store import BlockStore
from protos.isthmus.v1 import kv_store_pb2 as pb
from protos.isthmus.v1 import kv_store_pb2_grpc as pb_grpc

MAX_BLOCKS = 1 << 17
"""Of one sequence: bounds what a caller makes the store work."""


class KvStoreServicer(pb_grpc.KvStoreServiceServicer):
    """Serve it behind `mesh.status.StatusInterceptor`, beside the store's KvTransferService."""

    def __init__(self, store: BlockStore, sender: KvSender, *, model_digest: str) -> None:
        self.queries: Counter[str] = Counter()
        """Answered queries: all of the blocks are here, some, or none."""
        self.num_fetched_blocks = 0
        self._store = store
        self._sender = sender
        self._model_digest = model_digest
        self._num_fetches = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_fetches(self) -> int:
        """Under way now."""
        return self._num_fetches

    async def drained(self) -> None:
        """Return when nothing is being handed over to a worker."""
        await self._idle.wait()

    async def Query(
        self,
        request: pb.QueryRequest,
        context: aio.ServicerContext[pb.QueryRequest, pb.QueryResponse],
    ) -> pb.QueryResponse:
        hashes = self._checked(request)
        num_blocks = self._store.num_leading(hashes)
        result = "all" if num_blocks == len(hashes) else "some" if num_blocks else "none"
        self.queries[result] += 1
        return pb.QueryResponse(num_blocks=num_blocks)

    async def Fetch(
        self,
        request: pb.FetchRequest,
        context: aio.ServicerContext[pb.FetchRequest, pb.FetchResponse],
    ) -> pb.FetchResponse:
        hashes = self._checked(request)
        if request.first_block > MAX_BLOCKS:
            raise InvalidRequestError(f"first_block {request.first_block} is above {MAX_BLOCKS}")
        self._num_fetches += 1
        self._idle.clear()
        try:
            return await self._hand_over(request, hashes)
        finally:
            self._num_fetches -= 1
            if not self._num_fetches:
                self._idle.set()

    async def _hand_over(
        self, request: pb.FetchRequest, hashes: Sequence[bytes]
    ) -> pb.FetchResponse:
        size = self._store.memory.layout.block_size_tokens
        first = request.first_block
        async with self._store.reading(hashes) as block_ids:
            if not block_ids:
                return pb.FetchResponse()
            num_tokens = (first + len(block_ids)) * size
            async with self._sender.handover(
                request.fetch_id,
                decode_address=request.address,
                num_tokens=num_tokens,
                hash_blocks=_checking_size(size),
            ) as handover:
                if handover.receiver_id != request.worker_id:
                    raise PeerUnavailableError(
                        f"{request.address} is {handover.receiver_id}, not {request.worker_id}"
                    )
                if handover.num_cached_tokens < first * size:
                    raise LayoutMismatchError(
                        f"{request.worker_id} holds {handover.num_cached_tokens} tokens of the"
                        f" {first * size} before the blocks that it asks for"
                    )
                await handover.push([0] * first + block_ids, 0, num_tokens)
                await handover.commit(0)
        self.num_fetched_blocks += len(block_ids)
        return pb.FetchResponse(num_blocks=len(block_ids), num_bytes=handover.report.num_bytes)

    def _checked(self, request: pb.QueryRequest | pb.FetchRequest) -> list[bytes]:
        if request.model_digest != self._model_digest:
            raise LayoutMismatchError(
                f"the store holds KV of model {self._model_digest}, not of"
                f" {request.model_digest or 'an unnamed one'}"
            )
        hashes = list(request.block_hashes)
        if len(hashes) > MAX_BLOCKS or any(len(each) != HASH_BYTES for each in hashes):
            raise InvalidRequestError(
                f"expected at most {MAX_BLOCKS} hashes of {HASH_BYTES} bytes each"
            )
        return hashes


def _checking_size(size_tokens: int) -> Callable[[int], Sequence[bytes]]:
    """For Reserve. The worker knows what it has and what it expects: no hashes are needed."""

    def hash_blocks(block_size_tokens: int) -> Sequence[bytes]:
        if block_size_tokens != size_tokens:
            raise LayoutMismatchError(
                f"the worker's blocks have {block_size_tokens} tokens, the store's {size_tokens}"
            )
        return ()

    return hash_blocks
