"""Compose the decode worker: each line of the `async with` undoes itself in reverse order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpc import aio

from decode_worker.servicer import DecodeServicer
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.sharing import sharing_prefixes
from kv_transfer.rank.first_rank import FirstRank, first_rank
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiver_metrics import ReceiverCollector
from kv_transfer.servicer import KvTransferServicer
from mesh.worker import WorkerConfig, load_from, serving_worker, until_stopped
from protos.isthmus.v1 import decode_pb2_grpc, kv_transfer_pb2_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_DECODE

SERVICE_NAMES = ("isthmus.v1.DecodeService", "isthmus.v1.KvTransferService")


async def serve(
    settings: Mapping[str, Any], model_path: Path, environment: Mapping[str, str]
) -> None:
    """Run until SIGTERM, then leave the registry, drain and stop the engine.

    Args:
        settings: the sections worker, engine, transfer and collectives.
        model_path: a Hugging Face directory or a .gguf file.
        environment: where the ranks of this worker meet, if there are several.
    """
    async with first_rank(settings, model_path, environment, WORKER_ROLE_DECODE) as rank:
        if rank is not None:
            has_prefix_cache = settings["engine"].has_prefix_cache
            await _serve(rank, settings["worker"], has_prefix_cache=has_prefix_cache)


async def _serve(rank: FirstRank, worker: WorkerConfig, *, has_prefix_cache: bool) -> None:
    thread, identity = rank.thread, rank.identity
    block_size_tokens = rank.layout.block_size_tokens
    async with (
        KvReceiver(
            lender := PrefixLender(thread, thread, block_size_tokens=block_size_tokens),
            rank.receiving_group(),
            receiver_id=identity.worker_id,
            model_digest=identity.model_digest,
            config=rank.transfer,
            epoch=identity.epoch,
            shares_prefixes=has_prefix_cache,
        ) as receiver,
        sharing_prefixes(
            thread,
            rank.sending_group(),
            receiver,
            lender,
            hash_salt_of=rank.engine.model_config.rope_salt,
            identity=identity,
            redis_url=worker.redis_url,
            config=rank.transfer,
            metrics=rank.metrics,
        ) as prefixes,
    ):
        rank.metrics.register(ReceiverCollector(lambda: receiver.counters))
        servicer = DecodeServicer(prefixes.engine, receiver)

        def add_servicers(server: aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(servicer, server)
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(receiver), server
            )

        async with serving_worker(
            worker,
            identity,
            add_servicers=add_servicers,
            service_names=SERVICE_NAMES,
            drained=servicer.drained,
            load=lambda: load_from(thread.stats),
            metrics=rank.metrics,
        ) as serving:
            if has_prefix_cache:
                prefixes.start_fetching(serving.address)
            await until_stopped(thread, serving.stop_asked)
