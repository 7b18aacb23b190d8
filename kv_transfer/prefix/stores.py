"""The stores of this worker's model, as the registry names them, and calls to them."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import xxhash
from grpc import aio

from engine.errors import IsthmusError, PeerUnavailableError
from mesh.channel import is_cancelled, open_channel
from mesh.status import error_from_rpc
from protos.isthmus.v1 import kv_store_pb2 as pb
from protos.isthmus.v1 import kv_store_pb2_grpc as pb_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_STORE, WorkerRecord, WorkerRole

logger = logging.getLogger(__name__)

T = TypeVar("T")

QUERY_TIMEOUT_S = 0.5
"""Every request that lacks a prefix waits for an answer; a store that takes longer is no help."""
AVOID_S = 5.0
"""How long a store that failed is left alone."""
CLOSE_GRACE_S = 5.0
"""How long calls may go on to a store that left the registry: it drains, and answers them."""


class StoreSource(Protocol):
    """Who is there; `mesh.registry.WorkerDirectory` is one."""

    def workers(self, role: WorkerRole) -> list[WorkerRecord]: ...

    def on_change(self, callback: Callable[[], None]) -> None: ...


class Store:
    """Calls to one store."""

    def __init__(self, record: WorkerRecord) -> None:
        self.store_id = record.worker_id
        self.address = record.address
        self.model_digest = record.model_digest
        self.avoided_until_s = 0.0
        self._channel = open_channel(record.address)
        self._calls = pb_grpc.KvStoreServiceStub(self._channel)
        self._is_closed = False

    async def query(self, block_hashes: Sequence[bytes]) -> int:
        """Leading blocks that the store has; raises IsthmusError when it does not say."""
        request = pb.QueryRequest(model_digest=self.model_digest, block_hashes=block_hashes)
        answer = await self._answer(lambda: self._calls.Query(request, timeout=QUERY_TIMEOUT_S))
        num_blocks: int = answer.num_blocks
        return min(num_blocks, len(block_hashes))

    async def fetch(self, request: pb.FetchRequest, *, timeout_s: float) -> pb.FetchResponse:
        """Have blocks handed over to this worker; raises IsthmusError when that fails."""
        request.model_digest = self.model_digest
        return await self._answer(lambda: self._calls.Fetch(request, timeout=timeout_s))

    async def aclose(self) -> None:
        """Calls that are open have CLOSE_GRACE_S to end; new ones raise PeerUnavailableError."""
        self._is_closed = True
        await self._channel.close(CLOSE_GRACE_S)

    async def _answer(self, call: Callable[[], Awaitable[T]]) -> T:
        if self._is_closed:
            raise self._left()
        try:
            return await call()
        except aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise self._left() from None

    def _left(self) -> PeerUnavailableError:
        return PeerUnavailableError(f"store {self.store_id} has left the mesh")


class Stores:
    """Follows the registry; an async context manager, loop only.

    With several stores each prompt has one of its own, chosen by its first block, so that all
    workers look for it in the same place.
    """

    def __init__(self, source: StoreSource, *, model_digest: str) -> None:
        self._source = source
        self._model_digest = model_digest
        self._stores: dict[str, Store] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._source.on_change(self.refresh)
        self.refresh()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for store in self._stores.values():
            await store.aclose()
        self._stores.clear()
        for task in list(self._closing):
            await task

    def choose(self, first_hash: bytes) -> Store | None:
        """The store for prompts that begin with this block; None when none is of use now."""
        now_s = asyncio.get_running_loop().time()
        usable = [store for store in self._stores.values() if store.avoided_until_s <= now_s]
        return max(usable, key=lambda store: _weight(store, first_hash), default=None)

    @property
    def are_known(self) -> bool:
        """There are stores, of use or not."""
        return bool(self._stores)

    @property
    def are_avoided(self) -> bool:
        """There are stores, but each of them is left alone for now."""
        now_s = asyncio.get_running_loop().time()
        stores = self._stores.values()
        return self.are_known and all(store.avoided_until_s > now_s for store in stores)

    def avoid(self, store: Store, error: IsthmusError) -> None:
        """Leave a store alone for a while: it did not answer, or not in time."""
        logger.warning("store avoided for %g s store_id=%s: %s", AVOID_S, store.store_id, error)
        store.avoided_until_s = asyncio.get_running_loop().time() + AVOID_S

    def refresh(self) -> None:
        """Take over what the registry says now."""
        known = {
            record.worker_id: record
            for record in self._source.workers(WORKER_ROLE_STORE)
            if record.model_digest == self._model_digest
        }
        for store_id in self._stores.keys() - known.keys():
            task = asyncio.ensure_future(self._stores.pop(store_id).aclose())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        for store_id in known.keys() - self._stores.keys():
            self._stores[store_id] = Store(known[store_id])


def _weight(store: Store, first_hash: bytes) -> int:
    return xxhash.xxh3_64_intdigest(store.store_id.encode() + first_hash)
