"""One request and what came back: raw bytes with their arrival times, and no judgement of them.

The client shares its machine with the servers it measures, so while load is running it only keeps
what arrives; `answer.py` reads it when the load is over.
"""

import asyncio
import time
from dataclasses import dataclass, field

import httptools

REQUEST_TIMEOUT_S = 300.0


@dataclass(slots=True)
class Exchange:
    """A request with its answer so far. Times are of `time.perf_counter`."""

    request: bytes
    max_tokens: int
    start_s: float = 0.0
    """When the load asked for the request, which may be before a busy client could send it."""
    status: int = 0
    arrivals: list[tuple[float, bytes]] = field(default_factory=list)
    """(when, body bytes) of each piece as the socket gave it, chunk framing removed."""
    is_complete: bool = False
    failure: str = ""
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    """Set at the first byte of the body, and at the end if there was none."""


class _Reader(asyncio.Protocol):
    """Feeds one response into its exchange."""

    def __init__(self, exchange: Exchange, done: asyncio.Future[None]) -> None:
        self._exchange = exchange
        self._done = done
        self._parser = httptools.HttpResponseParser(self)
        self._now_s = 0.0

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self._end("connection lost" if exc is None else f"connection lost: {exc}")

    def on_headers_complete(self) -> None:
        self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if not self._exchange.arrivals:
            self._exchange.begun.set()
        self._exchange.arrivals.append((self._now_s, body))

    def on_message_complete(self) -> None:
        self._exchange.is_complete = True
        self._end("")

    def _end(self, failure: str) -> None:
        if not self._done.done():
            self._exchange.failure = failure
            self._done.set_result(None)


def post(host: str, path: str, body: bytes) -> bytes:
    """Return the bytes of a POST whose connection closes after the answer."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


async def perform(exchange: Exchange, *, host: str, port: int) -> None:
    """Send the request on a connection of its own and read until the answer ends.

    What goes wrong is noted in `exchange.failure`. Cancelling drops the connection and keeps what
    has arrived.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    try:
        transport, _ = await loop.create_connection(lambda: _Reader(exchange, done), host, port)
    except OSError as error:
        exchange.failure = f"cannot connect: {error}"
        exchange.begun.set()
        return
    try:
        transport.write(exchange.request)
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            await done
    except TimeoutError:
        exchange.failure = f"no end within {REQUEST_TIMEOUT_S:.0f} s"
    finally:
        transport.abort()
        exchange.begun.set()
