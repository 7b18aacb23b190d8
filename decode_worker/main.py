"""Compose the decode worker: each line of the `async with` undoes itself in reverse order."""

import asyncio
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpc import aio
from prometheus_client import CollectorRegistry

from decode_worker.servicer import DecodeServicer
from engine.checkpoint.digest import model_digest
from engine.checkpoint.model_id import model_id_of
from engine.runtime.build import build_engine, build_follower
from engine.runtime.core_share import CoreShare
from engine.runtime.engine_thread import EngineThread
from engine.runtime.membership import join_worker, pool_addresses
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.sharing import sharing_prefixes
from kv_transfer.rank.worker import kv_layout_of, other_ranks, serve_follower
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiver_metrics import ReceiverCollector
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from mesh.metrics import EngineCollector, ExpertCollector, RankCollector
from mesh.own_address import reachable_host
from mesh.telemetry import exporting_spans
from mesh.worker import (
    WorkerConfig,
    WorkerIdentity,
    load_from,
    serving_worker,
    until_stopped,
)
from protos.isthmus.v1 import decode_pb2_grpc, kv_transfer_pb2_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_DECODE

if TYPE_CHECKING:
    from engine.config import EngineConfig
    from kv_transfer.config import TransferConfig

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
    worker: WorkerConfig = settings["worker"]
    engine_config: EngineConfig = settings["engine"]
    transfer: TransferConfig = settings["transfer"]
    cores = CoreShare(
        worker.home_cores or sorted(os.sched_getaffinity(0)),
        fd=worker.core_share_fd,
        slot=worker.core_share_slot,
        max_threads=engine_config.num_threads,
    )
    membership = await asyncio.to_thread(
        join_worker, model_path, engine_config, settings["collectives"], environment
    )
    if membership is not None and membership.rank > 0:
        build = partial(build_follower, membership=membership, cores=cores)
        follower = await asyncio.to_thread(build, model_path, engine_config)
        reachable = reachable_host(worker.host, worker.redis_url)
        await serve_follower(follower, transfer, host=worker.host, reachable_host=reachable)
        return
    engine = await asyncio.to_thread(
        build_engine, model_path, engine_config, cores=cores, membership=membership
    )
    addresses = await asyncio.to_thread(pool_addresses, membership)
    digest = await asyncio.to_thread(model_digest, model_path)
    identity = WorkerIdentity.new(
        WORKER_ROLE_DECODE,
        model_id=model_id_of(worker.model),
        model_digest=digest,
        max_context_tokens=engine.limits.max_context_tokens,
        parallel=str(engine_config.parallel),
    )
    metrics = CollectorRegistry()
    if membership is not None:
        metrics.register(RankCollector(lambda: engine.rank_times))
    if engine.model_config.form.experts is not None:
        metrics.register(ExpertCollector(lambda: engine.expert_tokens))
    with exporting_spans(
        "isthmus-decode", instance_id=identity.worker_id, otlp_endpoint=worker.otlp_endpoint
    ):
        layout = kv_layout_of(engine)
        async with (
            EngineThread(engine, step_timeout_s=engine_config.step_timeout_s) as thread,
            other_ranks(addresses, transfer, worker_id=identity.worker_id) as others,
            KvReceiver(
                lender := PrefixLender(thread, thread, block_size_tokens=layout.block_size_tokens),
                ReceivingGroup(
                    layout,
                    engine.limits.num_blocks,
                    (LocalReceivingRank(engine.kv_pool, transfer), *others),
                ),
                receiver_id=identity.worker_id,
                model_digest=digest,
                config=transfer,
                epoch=identity.epoch,
                shares_prefixes=engine_config.has_prefix_cache,
            ) as receiver,
            sharing_prefixes(
                thread,
                SendingGroup(
                    layout,
                    engine.limits.num_blocks,
                    (LocalSendingRank(engine.kv_pool, transfer), *others),
                ),
                receiver,
                lender,
                hash_salt_of=engine.model_config.rope_salt,
                identity=identity,
                redis_url=worker.redis_url,
                config=transfer,
                metrics=metrics,
            ) as prefixes,
        ):
            metrics.register(EngineCollector(lambda: thread.stats))
            metrics.register(ReceiverCollector(lambda: receiver.counters))
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
                metrics=metrics,
            ) as serving:
                if engine_config.has_prefix_cache:
                    prefixes.start_fetching(serving.address)
                await until_stopped(thread, serving.stop_asked)
