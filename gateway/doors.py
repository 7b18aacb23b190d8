"""Opens both doors, HTTP and gRPC, over one service."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from grpc import aio
from prometheus_client import CollectorRegistry

from gateway.http.app import new_app
from gateway.http.server import listening_http
from gateway.service import InferenceService
from gateway.servicer import InferenceServicer
from mesh.server import ServerHealth, listening
from protos.isthmus.v1 import inference_pb2, inference_pb2_grpc

SERVICE_NAME = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name


@dataclass(frozen=True, kw_only=True, slots=True)
class Doors:
    """Bound addresses, host:port."""

    http: str
    grpc: str


@asynccontextmanager
async def open_doors(
    service: InferenceService,
    registry: CollectorRegistry,
    *,
    host: str,
    http_port: int,
    grpc_port: int,
    drain_grace_s: float,
    health: ServerHealth | None = None,
) -> AsyncIterator[Doors]:
    """Serve inside the block.

    Raises:
        ValueError: an address cannot be bound; the text names it.
    """

    def add_servicers(server: aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceServicer(service), server)

    async with (
        listening(
            add_servicers,
            address=f"{host}:{grpc_port}",
            drain_grace_s=drain_grace_s,
            health=health,
            service_names=[SERVICE_NAME],
        ) as bound_grpc_port,
        listening_http(
            new_app(service, registry), host=host, port=http_port, drain_grace_s=drain_grace_s
        ) as bound_http_port,
    ):
        yield Doors(http=f"{host}:{bound_http_port}", grpc=f"{host}:{bound_grpc_port}")
