"""A gateway over fake workers, with both doors on free ports."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from gateway.admission import Admission
from gateway.chat_template import ChatTemplate
from gateway.doors import open_doors
from gateway.metrics import GatewayMetrics
from gateway.pools import WorkerPools
from gateway.routing import LeastLoaded
from gateway.service import InferenceService
from gateway.session import RecoveryConfig
from tests.fakes.byte_tokenizer import CHAT_TEMPLATE, byte_tokenizer
from tests.fakes.workers import FakeWorker, ListedWorker, StaticDirectory, running

MODEL_ID = "fake-model"
QUICK_RECOVERY = RecoveryConfig(wait_for_worker_s=5.0, retry_delay_s=0.001)


@dataclass(slots=True)
class RunningGateway:
    http_url: str
    grpc_address: str
    service: InferenceService
    directory: StaticDirectory
    registry: CollectorRegistry

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    async def aborts_acknowledged(self) -> None:
        for worker in self.service.pools.decode.values():
            await worker.stream.aborts_acknowledged()


@asynccontextmanager
async def gateway_over(
    *workers: FakeWorker,
    max_num_sequences: int = 64,
    recovery: RecoveryConfig = QUICK_RECOVERY,
    template: str | None = CHAT_TEMPLATE,
) -> AsyncIterator[RunningGateway]:
    """Start the workers and a gateway, and wait until it is connected to all."""
    async with (
        running(*workers),
        gateway_over_started(
            *workers, max_num_sequences=max_num_sequences, recovery=recovery, template=template
        ) as gateway,
    ):
        yield gateway


@asynccontextmanager
async def gateway_over_started(
    *workers: ListedWorker,
    max_num_sequences: int = 64,
    recovery: RecoveryConfig = QUICK_RECOVERY,
    template: str | None = CHAT_TEMPLATE,
) -> AsyncIterator[RunningGateway]:
    """The same over workers that run already."""
    registry = CollectorRegistry()
    directory = StaticDirectory(*workers)
    async with (
        asyncio.TaskGroup() as tasks,
        WorkerPools(directory, LeastLoaded(), model_id=MODEL_ID) as pools,
    ):
        service = InferenceService(
            model_id=MODEL_ID,
            tokenizer=byte_tokenizer(),
            chat_template=ChatTemplate(template, {}) if template is not None else None,
            pools=pools,
            admission=Admission(max_num_sequences),
            metrics=GatewayMetrics(registry),
            recovery=recovery,
            tasks=tasks,
        )
        while not all(worker.stream.is_available for worker in pools.decode.values()):
            await pools.wait_for_change()
        async with open_doors(
            service,
            registry,
            host="127.0.0.1",
            http_port=0,
            grpc_port=0,
            drain_grace_s=0.2,
        ) as doors:
            yield RunningGateway(
                http_url=f"http://{doors.http}",
                grpc_address=doors.grpc,
                service=service,
                directory=directory,
                registry=registry,
            )
