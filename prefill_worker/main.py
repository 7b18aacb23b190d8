"""Compose the prefill worker: each line of the `async with` undoes itself in reverse order."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpc import aio

from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.sharing import sharing_prefixes
from kv_transfer.rank.first_rank import FirstRank, first_rank
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiver_metrics import ReceiverCollector
from kv_transfer.sender import KvSender
from kv_transfer.servicer import KvTransferServicer
from mesh.channel import open_channel
from mesh.worker import WorkerConfig, load_from, serving_worker, until_stopped
from prefill_worker.metrics import HandoverSeconds, SenderCollector
from prefill_worker.prefill import Prefiller
from prefill_worker.servicer import PrefillServicer
from protos.isthmus.v1 import kv_transfer_pb2_grpc, prefill_pb2_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_PREFILL

SERVICE_NAMES = ("isthmus.v1.PrefillService", "isthmus.v1.KvTransferService")


async def serve(
    settings: Mapping[str, Any], model_path: Path, environment: Mapping[str, str]
) -> None:
    """Run until SIGTERM, then leave the registry, drain and stop the engine.

    Args:
        settings: the sections worker, engine, transfer and collectives.
        model_path: a Hugging Face directory or a .gguf file.
        environment: where the ranks of this worker meet, if there are several.
    """
    async with first_rank(
        settings, model_path, environment, WORKER_ROLE_PREFILL, is_for_prompts=True
    ) as rank:
        if rank is not None:
            has_prefix_cache = settings["engine"].has_prefix_cache
            await _serve(rank, settings["worker"], has_prefix_cache=has_prefix_cache)


async def _serve(rank: FirstRank, worker: WorkerConfig, *, has_prefix_cache: bool) -> None:
    thread, identity = rank.thread, rank.identity
    hash_salt_of = rank.engine.model_config.rope_salt
    block_size_tokens = rank.layout.block_size_tokens
    async with (
        KvSender(
            group := rank.sending_group(),
            sender_id=identity.worker_id,
            model_digest=identity.model_digest,
            open_channel=open_channel,
            config=rank.transfer,
            on_end=HandoverSeconds(rank.metrics).observe,
        ) as sender,
        KvReceiver(
            lender := PrefixLender(thread, None, block_size_tokens=block_size_tokens),
            rank.receiving_group(),
            receiver_id=identity.worker_id,
            model_digest=identity.model_digest,
            config=rank.transfer,
            epoch=identity.epoch,
            shares_prefixes=False,
        ) as receiver,
        sharing_prefixes(
            thread,
            group,
            receiver,
            lender,
            hash_salt_of=hash_salt_of,
            identity=identity,
            redis_url=worker.redis_url,
            config=rank.transfer,
            metrics=rank.metrics,
        ) as prefixes,
    ):
        rank.metrics.register(SenderCollector(lambda: sender.counters))
        rank.metrics.register(ReceiverCollector(lambda: receiver.counters))
        prefiller = Prefiller(prefixes.engine, sender, hash_salt_of=hash_salt_of)

        def add_servicers(server: aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(
                PrefillServicer(prefiller), server
            )
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(receiver), server
            )

        async with serving_worker(
            worker,
            identity,
            add_servicers=add_servicers,
            service_names=SERVICE_NAMES,
            drained=prefiller.drained,
            load=lambda: load_from(thread.stats),
            metrics=rank.metrics,
        ) as serving:
            if has_prefix_cache:
                prefixes.start_fetching(serving.address)
            await until_stopped(thread, serving.stop_asked)
