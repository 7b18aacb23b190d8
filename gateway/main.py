"""The gateway process: one `async with` whose lines undo themselves in reverse."""

import asyncio
import logging
import os
import secrets
import socket
from functools import partial
from pathlib import Path

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector

from gateway.admission import Admission
from gateway.chat_template import ChatTemplate
from gateway.config import GatewayConfig
from gateway.doors import Doors, open_doors
from gateway.metrics import GatewayMetrics
from gateway.pools import WorkerPools
from gateway.routing import LeastLoaded
from gateway.service import InferenceService
from gateway.session import RecoveryConfig
from gateway.tokenizer import TextModel
from mesh.process import stop_signals, write_ready_file
from mesh.registry import WorkerDirectory, connect_redis, registered
from mesh.server import ServerHealth
from mesh.telemetry import exporting_spans
from protos.isthmus.v1.registry_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_ROLE_GATEWAY,
    WORKER_ROLE_PREFILL,
    WorkerRecord,
)

logger = logging.getLogger(__name__)


async def serve(
    config: GatewayConfig, recovery: RecoveryConfig, *, model_id: str, text_model: TextModel
) -> None:
    """Answer requests until SIGTERM or SIGINT, then let open ones end.

    Raises:
        ValueError: an address cannot be bound, or the Redis URL cannot be read.
        PeerUnavailableError: no Redis answers.
    """
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    PlatformCollector(registry=registry)
    host = socket.gethostname().split(".")[0]
    gateway_id = f"gateway-{host}-{os.getpid()}-{secrets.token_hex(3)}"
    template = text_model.chat_template
    metrics = GatewayMetrics(registry)
    health = ServerHealth()
    with exporting_spans(
        "isthmus-gateway", instance_id=gateway_id, otlp_endpoint=config.otlp_endpoint
    ):
        async with (
            connect_redis(config.redis_url) as redis,
            WorkerDirectory(redis, roles=[WORKER_ROLE_PREFILL, WORKER_ROLE_DECODE]) as directory,
            asyncio.TaskGroup() as tasks,
            WorkerPools(directory, LeastLoaded(), model_id=model_id) as pools,
            open_doors(
                InferenceService(
                    model_id=model_id,
                    tokenizer=text_model.tokenizer,
                    chat_template=(
                        ChatTemplate(template, text_model.special_tokens) if template else None
                    ),
                    pools=pools,
                    admission=Admission(config.max_num_sequences),
                    metrics=metrics,
                    recovery=recovery,
                    tasks=tasks,
                ),
                registry,
                host=config.host,
                http_port=config.http_port,
                grpc_port=config.grpc_port,
                drain_grace_s=config.drain_grace_s,
                health=health,
            ) as doors,
            stop_signals() as stop_asked,
            registered(redis, lambda: _record(gateway_id, model_id, doors, pools)),
        ):
            for role in ("prefill", "decode"):
                metrics.workers.labels(role).set_function(partial(pools.num_open_workers, role))
            following = tasks.create_task(_follow_pools(health, pools), name="health")
            _say_ready(config.ready_file, doors)
            try:
                await stop_asked.wait()
            finally:
                following.cancel()
            logger.info("draining")


def _record(gateway_id: str, model_id: str, doors: Doors, pools: WorkerPools) -> WorkerRecord:
    return WorkerRecord(
        worker_id=gateway_id,
        role=WORKER_ROLE_GATEWAY,
        address=doors.grpc,
        metrics_address=doors.http,
        model_id=model_id,
        max_context_tokens=pools.max_context_tokens,
        pid=os.getpid(),
    )


async def _follow_pools(health: ServerHealth, pools: WorkerPools) -> None:
    """grpc.health.v1 says SERVING while a decode worker is connected."""
    while True:
        await health.set_serving(is_serving=pools.is_ready)
        await pools.wait_for_change()


def _say_ready(ready_file: Path | None, doors: Doors) -> None:
    write_ready_file(
        ready_file, "gateway", {"http": doors.http, "grpc": doors.grpc, "metrics": doors.http}
    )
    logger.info("ready http=%s grpc=%s", doors.http, doors.grpc)
