"""Compose a worker's side of the store: the same for both kinds of worker."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from engine.runtime.engine_thread import EngineThread
from kv_transfer.config import TransferConfig
from kv_transfer.prefix.engine import FetchingEngine
from kv_transfer.prefix.fetcher import PrefixFetcher
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.metrics import PrefixCollector
from kv_transfer.prefix.publisher import PrefixPublisher
from kv_transfer.prefix.stores import Stores
from kv_transfer.receiver import KvReceiver
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from mesh.registry import WorkerDirectory, connect_redis
from mesh.worker import WorkerIdentity
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_STORE


@dataclass(frozen=True, slots=True)
class PrefixSharing:
    """A worker's prefixes and the stores; made by `sharing_prefixes`."""

    engine: FetchingEngine
    fetcher: PrefixFetcher
    publisher: PrefixPublisher
    stores: Stores

    def start_fetching(self, address: str) -> None:
        """Stores reach this worker's KvTransferService at `address` (host:port) from now on."""
        self.fetcher.address = address


@asynccontextmanager
async def sharing_prefixes(
    thread: EngineThread,
    group: SendingGroup,
    receiver: KvReceiver,
    lender: PrefixLender,
    *,
    hash_salt_of: Callable[[int], int],
    identity: WorkerIdentity,
    redis_url: str,
    config: TransferConfig,
    metrics: CollectorRegistry,
) -> AsyncIterator[PrefixSharing]:
    """Publish what ends, fetch what pays, inside the block; costs nothing while there is no store.

    Args:
        thread: this worker's; what computes prompts is submitted to the result's engine.
        group: the ranks whose pools are read.
        receiver: whose blocks come from `lender`.
        lender: see there.
        hash_salt_of: the engine's, by prompt length.
        identity: of this worker.
        redis_url: where stores register.
        config: of handovers, also of those with stores.
        metrics: gets what is counted.
    """
    worker_id, layout = identity.worker_id, receiver.layout
    async with (
        connect_redis(redis_url) as redis,
        WorkerDirectory(redis, roles=[WORKER_ROLE_STORE]) as directory,
        Stores(directory, model_digest=identity.model_digest) as stores,
        KvSender(
            group,
            sender_id=worker_id,
            model_digest=identity.model_digest,
            open_channel=open_channel,
            config=config,
        ) as sender,
        PrefixPublisher(thread, sender, stores, worker_id=worker_id, layout=layout) as publisher,
    ):
        fetcher = PrefixFetcher(
            thread, stores, receiver, lender, worker_id=worker_id, layout=layout
        )
        metrics.register(PrefixCollector(publisher, fetcher))
        fetching = FetchingEngine(
            thread,
            fetcher,
            block_size_tokens=layout.block_size_tokens,
            hash_salt_of=hash_salt_of,
        )
        thread.on_prefix_ended = publisher.offer
        try:
            yield PrefixSharing(fetching, fetcher, publisher, stores)
        finally:
            await fetching.aclose()
