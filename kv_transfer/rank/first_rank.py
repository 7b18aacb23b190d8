"""Rank 0 of a worker, loaded and computing: what both roles are put together from."""

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry

from engine.checkpoint.digest import model_digest
from engine.checkpoint.model_id import model_id_of
from engine.runtime.build import ModelEngine, build_engine, build_follower
from engine.runtime.core_share import CoreShare
from engine.runtime.engine_thread import EngineThread
from engine.runtime.membership import join_worker, pool_addresses
from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.rank.remote import RemoteRank
from kv_transfer.rank.worker import kv_layout_of, other_ranks, serve_follower
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sending_group import SendingGroup
from mesh.metrics import EngineCollector, ExpertCollector, RankCollector
from mesh.own_address import reachable_host
from mesh.registry import role_name
from mesh.telemetry import exporting_spans
from mesh.worker import WorkerConfig, WorkerIdentity
from protos.isthmus.v1.registry_pb2 import WorkerRole

if TYPE_CHECKING:
    from engine.config import EngineConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstRank:
    """Made by `first_rank`."""

    engine: ModelEngine
    """For what does not change; `thread` steps it."""
    thread: EngineThread
    layout: GroupLayout
    """Of all ranks."""
    others: Sequence[RemoteRank]
    transfer: TransferConfig
    identity: WorkerIdentity
    metrics: CollectorRegistry

    def sending_group(self) -> SendingGroup:
        """All ranks, as those whose pools are read."""
        own = LocalSendingRank(self.engine.kv_pool, self.transfer)
        return SendingGroup(self.layout, self.engine.limits.num_blocks, (own, *self.others))

    def receiving_group(self) -> ReceivingGroup:
        """All ranks, as those whose pools are written."""
        own = LocalReceivingRank(self.engine.kv_pool, self.transfer)
        return ReceivingGroup(self.layout, self.engine.limits.num_blocks, (own, *self.others))


@asynccontextmanager
async def first_rank(
    settings: Mapping[str, Any],
    model_path: Path,
    environment: Mapping[str, str],
    role: WorkerRole,
    *,
    is_for_prompts: bool = False,
) -> AsyncIterator[FirstRank | None]:
    """Load a model and step it inside the block; None in the place of another rank that has ended.

    Args:
        settings: the sections worker, engine, transfer and collectives.
        model_path: a Hugging Face directory or a .gguf file.
        environment: where the ranks of this worker meet, if there are several.
        role: of the worker.
        is_for_prompts: see `build_engine`.
    """
    worker: WorkerConfig = settings["worker"]
    config: EngineConfig = settings["engine"]
    transfer: TransferConfig = settings["transfer"]
    cores = CoreShare(
        worker.home_cores or sorted(os.sched_getaffinity(0)),
        fd=worker.core_share_fd,
        slot=worker.core_share_slot,
        max_threads=config.num_threads,
    )
    membership = await asyncio.to_thread(
        join_worker, model_path, config, settings["collectives"], environment
    )
    if membership is not None and membership.rank > 0:
        build = partial(
            build_follower, membership=membership, cores=cores, is_for_prompts=is_for_prompts
        )
        follower = await asyncio.to_thread(build, model_path, config)
        reachable = reachable_host(worker.host, worker.redis_url)
        await serve_follower(follower, transfer, host=worker.host, reachable_host=reachable)
        yield None
        return
    engine = await asyncio.to_thread(
        build_engine,
        model_path,
        config,
        cores=cores,
        membership=membership,
        is_for_prompts=is_for_prompts,
    )
    addresses = await asyncio.to_thread(pool_addresses, membership)
    identity = WorkerIdentity.new(
        role,
        model_id=model_id_of(worker.model),
        model_digest=await asyncio.to_thread(model_digest, model_path),
        max_context_tokens=engine.limits.max_context_tokens,
        parallel=str(config.parallel),
    )
    metrics = CollectorRegistry()
    if membership is not None:
        metrics.register(RankCollector(lambda: engine.rank_times))
    if engine.model_config.form.experts is not None:
        metrics.register(ExpertCollector(lambda: engine.expert_tokens))
    with exporting_spans(
        f"isthmus-{role_name(role)}",
        instance_id=identity.worker_id,
        otlp_endpoint=worker.otlp_endpoint,
    ):
        async with (
            EngineThread(engine, step_timeout_s=config.step_timeout_s) as thread,
            other_ranks(addresses, transfer, worker_id=identity.worker_id) as others,
        ):
            metrics.register(EngineCollector(lambda: thread.stats))
            yield FirstRank(
                engine=engine,
                thread=thread,
                layout=kv_layout_of(engine),
                others=others,
                transfer=transfer,
                identity=identity,
                metrics=metrics,
            )
