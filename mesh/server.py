"""Start and drain a grpc.aio server with health, reflection and the mesh's interceptors."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from grpc import aio
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mesh.limits import SERVER_OPTIONS
from mesh.status import StatusInterceptor


class ServerHealth:
    """grpc.health.v1 of one server: NOT_SERVING until its owner says otherwise."""

    def __init__(self) -> None:
        self._servicer = grpc_health.aio.HealthServicer()
        self._service_names: Sequence[str] = ()

    async def attach(self, server: aio.Server, service_names: Sequence[str]) -> None:
        """Answer for `service_names` and for the server as a whole (the empty name)."""
        self._service_names = ("", *service_names)
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        await self.set_serving(is_serving=False)

    async def set_serving(self, *, is_serving: bool = True) -> None:
        """Say whether new calls are welcome; without effect once the server drains."""
        status = health_pb2.HealthCheckResponse
        for name in self._service_names:
            await self._servicer.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """NOT_SERVING from now on, for good."""
        await self._servicer.enter_graceful_shutdown()


@asynccontextmanager
async def listening(
    add_servicers: Callable[[aio.Server], None],
    *,
    address: str,
    drain_grace_s: float,
    health: ServerHealth | None = None,
    service_names: Sequence[str] = (),
) -> AsyncIterator[int]:
    """Serve inside the block, yielding the bound port; on exit drain for `drain_grace_s`.

    Health is NOT_SERVING until the caller awaits `health.set_serving()`, and becomes NOT_SERVING
    again before anything else on exit. Calls that are open then have `drain_grace_s` to end.

    Args:
        add_servicers: adds the services to the server, before it starts.
        address: host:port; port 0 takes a free one.
        drain_grace_s: 0 cancels open calls at once.
        health: made here when the caller does not want to change it; then SERVING at once.
        service_names: full names, for health and reflection.

    Raises:
        ValueError: the address cannot be bound; the text names it.
    """
    server = aio.server(options=SERVER_OPTIONS, interceptors=[StatusInterceptor()])
    add_servicers(server)
    served_health = health or ServerHealth()
    await served_health.attach(server, service_names)
    reflection.enable_server_reflection(
        (
            *service_names,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            reflection.SERVICE_NAME,
        ),
        server,
    )
    port = _bound_port(server, address)
    await server.start()
    if health is None:
        await served_health.set_serving()
    try:
        yield port
    finally:
        await served_health.drain()
        await server.stop(drain_grace_s)


def _bound_port(server: aio.Server, address: str) -> int:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise ValueError(
            f"cannot listen on {address}: the port is in use, or the host is not one of this"
            " machine's; choose another address, or port 0 for a free one"
        )
    return port
