"""Runs the HTTP application on the running event loop."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import uvicorn
from starlette.types import ASGIApp

BACKLOG = 2048
KEEP_ALIVE_S = 75


class _Server(uvicorn.Server):
    """Uvicorn without its signal handlers (the process has its own), and awaitable."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening_http(
    app: ASGIApp, *, host: str, port: int, drain_grace_s: float
) -> AsyncIterator[int]:
    """Serve inside the block, yielding the bound port; on exit open requests get `drain_grace_s`.

    Raises:
        ValueError: the address cannot be bound; the text names it.
    """
    with bound_socket(host, port) as listener:
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(drain_grace_s)),
            )
        )
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(server.serve(sockets=[listener]), name="http-server")
            await server.is_listening.wait()
            try:
                yield int(listener.getsockname()[1])
            finally:
                server.should_exit = True
                await serving  # here: an error would make the task group cancel it, undrained


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ValueError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --http-port, or 0 "
            "for a free one"
        ) from error
