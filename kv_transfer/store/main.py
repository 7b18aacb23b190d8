"""Compose the store: each line of the `async with` undoes itself in reverse order."""

import asyncio
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from grpc import aio
from prometheus_client import CollectorRegistry

from engine.checkpoint.digest import model_digest
from engine.checkpoint.model_id import model_id_of
from engine.checkpoint.read import read_config
from engine.kv_cache.full_layout import full_kv_layout
from engine.kv_cache.layout import KvLayout
from kv_transfer.offer import PROTOCOL_VERSION
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiver_metrics import ReceiverCollector
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from kv_transfer.store.block_store import BlockStore
from kv_transfer.store.config import StoreConfig
from kv_transfer.store.memory import StoreMemory
from kv_transfer.store.metrics import StoreCollector
from kv_transfer.store.servicer import KvStoreServicer
from kv_transfer.store.spill import Spill
from mesh.channel import open_channel
from mesh.worker import WorkerConfig, WorkerIdentity, serving_worker
from protos.isthmus.v1 import kv_store_pb2_grpc, kv_transfer_pb2_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_STORE, WorkerLoad

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from kv_transfer.config import TransferConfig

logger = logging.getLogger(__name__)

SERVICE_NAMES = ("isthmus.v1.KvStoreService", "isthmus.v1.KvTransferService")


async def serve(
    settings: Mapping[str, Any], model_path: Path, environment: Mapping[str, str]
) -> None:
    """Run until SIGTERM, then leave the registry and end the handovers under way.

    Args:
        settings: the sections worker, store, transfer and engine.
        model_path: a Hugging Face directory or a .gguf file; its weights are fingerprinted only.
        environment: not looked at.
    """
    worker: WorkerConfig = settings["worker"]
    transfer: TransferConfig = settings["transfer"]
    engine: EngineConfig = settings["engine"]
    config: StoreConfig = settings["store"]
    layout = full_kv_layout(read_config(model_path), engine)
    digest = await asyncio.to_thread(model_digest, model_path)
    identity = WorkerIdentity.new(
        WORKER_ROLE_STORE,
        model_id=model_id_of(worker.model),
        model_digest=digest,
        max_context_tokens=0,
        parallel="",
    )
    with ExitStack() as stack:
        num_blocks = num_memory_blocks(config, layout)
        memory = stack.enter_context(await asyncio.to_thread(StoreMemory, layout, num_blocks))
        spill = None
        if config.spill_dir is not None:
            spill = stack.enter_context(
                Spill(
                    config.spill_dir / content_name(layout, digest),
                    block_bytes=layout.block_bytes,
                    max_bytes=config.spill_bytes,
                )
            )
        store = BlockStore(memory, spill)
        logger.info(
            "store blocks=%d bytes=%d tokens=%d spilled_bytes=%d",
            num_blocks,
            num_blocks * layout.block_bytes,
            num_blocks * layout.block_size_tokens,
            spill.num_bytes if spill else 0,
        )
        async with (
            KvReceiver(
                store,
                ReceivingGroup.single(memory, transfer),
                receiver_id=identity.worker_id,
                model_digest=digest,
                config=transfer,
                epoch=identity.epoch,
                shares_prefixes=False,
            ) as receiver,
            KvSender(
                SendingGroup.single(memory, transfer),
                sender_id=identity.worker_id,
                model_digest=digest,
                open_channel=open_channel,
                config=transfer,
            ) as sender,
        ):
            servicer = KvStoreServicer(store, sender, model_digest=digest)
            metrics = CollectorRegistry()
            metrics.register(StoreCollector(store, servicer))
            metrics.register(ReceiverCollector(lambda: receiver.counters))

            def add_servicers(server: aio.Server) -> None:
                kv_store_pb2_grpc.add_KvStoreServiceServicer_to_server(servicer, server)
                kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                    KvTransferServicer(receiver), server
                )

            def load() -> WorkerLoad:
                used = store.shelf.num_filed + store.shelf.num_arriving
                return WorkerLoad(num_blocks=num_blocks, num_free_blocks=num_blocks - used)

            async with serving_worker(
                worker,
                identity,
                add_servicers=add_servicers,
                service_names=SERVICE_NAMES,
                drained=servicer.drained,
                load=load,
                metrics=metrics,
            ) as serving:
                await serving.stop_asked.wait()


def num_memory_blocks(config: StoreConfig, layout: KvLayout) -> int:
    """Raises ValueError when not one block fits."""
    num_blocks = config.memory_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ValueError(
            f"memory_bytes of {config.memory_bytes} hold no block of {layout.block_bytes} bytes"
        )
    return num_blocks


def content_name(layout: KvLayout, digest: str) -> str:
    """A folder name that blocks share only when one can stand for the other."""
    return xxhash.xxh3_128_hexdigest(f"{digest} {layout} {PROTOCOL_VERSION}".encode())
