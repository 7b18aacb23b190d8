"""What both worker kinds are besides their servicers: settings, server, registry entry, metrics."""

import asyncio
import logging
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpc import aio
from prometheus_client import CollectorRegistry

from engine.errors import EngineDeadError
from engine.runtime.commands import EngineStats
from mesh.logs import LogFormat
from mesh.metrics import serving_metrics
from mesh.own_address import reachable_host
from mesh.process import stop_signals, write_ready_file
from mesh.registry import connect_redis, registered, role_name
from mesh.server import ServerHealth, listening
from protos.isthmus.v1.registry_pb2 import WorkerLoad, WorkerRecord, WorkerRole

logger = logging.getLogger(__name__)

_CLOSE_GRACE_S = 0.5
"""For calls that the drained worker still answers, such as a health watch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerConfig:
    """Where a worker listens, whom it joins and how it leaves."""

    model: str = "demo"
    """demo, a directory, a .gguf file or a Hugging Face id."""
    redis_url: str = "redis://127.0.0.1:6379"
    host: str = "127.0.0.1"
    port: int = 0
    """gRPC; 0 picks a free one."""
    advertise_address: str = ""
    """host:port by which others reach this worker; empty: host (for a wildcard, the address
    towards Redis) and the bound port. A port of 0 stands for the bound one."""
    metrics_port: int = 0
    drain_grace_s: float = 30.0
    """How long sequences that are open at SIGTERM have to end."""
    ready_file: Path | None = None
    """Written once the worker serves."""
    home_cores: tuple[int, ...] = ()
    """CPU cores that are this worker's own; empty: all that the process may use."""
    core_share_fd: int | None = None
    """Inherited from the launcher: busy flags of the workers of this host."""
    core_share_slot: int = 0
    """This worker's place among them."""
    otlp_endpoint: str = ""
    """http://host:port of an OTLP gRPC receiver; empty: OTEL_EXPORTER_OTLP_ENDPOINT, if set."""
    log_level: str = "info"
    log_format: LogFormat = LogFormat.HUMAN

    def __post_init__(self) -> None:
        for name in ("port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} must be in [0, 65535], got {getattr(self, name)}")
        if self.drain_grace_s < 0:
            raise ValueError(f"drain_grace_s must be at least 0, got {self.drain_grace_s}")

    def advertised(self, port: int) -> str:
        """The address that goes into the registry."""
        host, _, chosen = self.advertise_address.rpartition(":")
        host = host or reachable_host(self.host, self.redis_url)
        return f"{host}:{chosen if chosen not in {'', '0'} else port}"


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerIdentity:
    """Who this start of the worker is and what it serves."""

    role: WorkerRole
    worker_id: str
    epoch: int
    model_id: str
    model_digest: str
    max_context_tokens: int
    parallel: str
    """Its ranks by axis, such as tp=2,pp=2."""

    @classmethod
    def new(
        cls,
        role: WorkerRole,
        *,
        model_id: str,
        model_digest: str,
        max_context_tokens: int,
        parallel: str,
    ) -> "WorkerIdentity":
        """A worker id that no other start of any worker has."""
        host = socket.gethostname().split(".")[0]
        return cls(
            role=role,
            worker_id=f"{role_name(role)}-{host}-{os.getpid()}-{secrets.token_hex(3)}",
            epoch=secrets.randbits(63),
            model_id=model_id,
            model_digest=model_digest,
            max_context_tokens=max_context_tokens,
            parallel=parallel,
        )


@dataclass(frozen=True, slots=True)
class Serving:
    """A worker that answers."""

    address: str
    """host:port under which others know its gRPC server."""
    stop_asked: asyncio.Event
    """Set by a signal to stop."""


@asynccontextmanager
async def serving_worker(
    config: WorkerConfig,
    identity: WorkerIdentity,
    *,
    add_servicers: Callable[[aio.Server], None],
    service_names: Sequence[str],
    drained: Callable[[], Awaitable[None]],
    load: Callable[[], WorkerLoad],
    metrics: CollectorRegistry,
) -> AsyncIterator[Serving]:
    """Be in the registry and answer inside the block; then leave in the reverse order.

    On exit the record goes first, so that nothing new comes. The server answers on until
    `drained` returns or `drain_grace_s` is over: a sequence that was promised KV still gets it.
    """
    async with AsyncExitStack() as stack:
        redis = await stack.enter_async_context(connect_redis(config.redis_url))
        metrics_port = stack.enter_context(
            serving_metrics(metrics, host=config.host, port=config.metrics_port)
        )
        health = ServerHealth()
        port = await stack.enter_async_context(
            listening(
                add_servicers,
                address=f"{config.host}:{config.port}",
                drain_grace_s=_CLOSE_GRACE_S,
                health=health,
                service_names=service_names,
            )
        )
        record = WorkerRecord(
            worker_id=identity.worker_id,
            role=identity.role,
            epoch=identity.epoch,
            address=config.advertised(port),
            metrics_address=f"{config.host}:{metrics_port}",
            model_id=identity.model_id,
            model_digest=identity.model_digest,
            max_context_tokens=identity.max_context_tokens,
            pid=os.getpid(),
            parallel=identity.parallel,
        )

        def current_record() -> WorkerRecord:
            record.load.CopyFrom(load())
            return record

        stack.push_async_callback(_drain, drained, health, config.drain_grace_s)
        stop_asked = await stack.enter_async_context(stop_signals())
        await stack.enter_async_context(registered(redis, current_record))
        await health.set_serving()
        write_ready_file(
            config.ready_file,
            role_name(identity.role),
            {"grpc": f"{config.host}:{port}", "metrics": record.metrics_address},
        )
        logger.info("ready worker_id=%s address=%s", identity.worker_id, record.address)
        yield Serving(record.address, stop_asked)


async def _drain(
    drained: Callable[[], Awaitable[None]], health: ServerHealth, drain_grace_s: float
) -> None:
    await health.drain()
    try:
        async with asyncio.timeout(drain_grace_s):
            await drained()
    except TimeoutError:
        logger.warning("sequences still open after drain_grace_s=%s are cut off", drain_grace_s)


class MortalEngine(Protocol):
    """What `until_stopped` watches: an EngineThread."""

    @property
    def dead(self) -> asyncio.Event:
        """Set when the engine cannot go on."""

    @property
    def death(self) -> EngineDeadError | None:
        """Why."""


async def until_stopped(engine: MortalEngine, stop_asked: asyncio.Event) -> None:
    """Return when asked to stop.

    Raises:
        EngineDeadError: the engine died first; the process must be replaced.
    """
    waiting = {
        asyncio.ensure_future(stop_asked.wait()),
        asyncio.ensure_future(engine.dead.wait()),
    }
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    if engine.death is not None:
        raise engine.death


def load_from(stats: EngineStats) -> WorkerLoad:
    """What a worker with an engine says of its load in the registry."""
    return WorkerLoad(
        num_waiting=stats.num_waiting,
        num_running=stats.num_running,
        num_waiting_tokens=stats.num_waiting_tokens,
        num_free_blocks=stats.num_free_blocks,
        num_blocks=stats.num_blocks,
    )
