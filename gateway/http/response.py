"""Writes one ASGI response: a JSON body, or server-sent events."""

from collections.abc import Mapping

from starlette.types import Send

from gateway.http.errors import ErrorReply

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ResponseWriter:
    """The status is sent with the first byte, so that errors before it have their own."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.is_started = False
        self._send = send
        self._id_header = (b"x-request-id", request_id.encode("latin-1"))

    async def body(
        self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """The whole response."""
        extra = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in (headers or {}).items()]
        length = (b"content-length", b"%d" % len(body))
        await self._start(status, [_JSON, length, self._id_header, *extra])
        await self._send({"type": "http.response.body", "body": body})

    async def events(self, events: bytes, *, is_last: bool = False) -> None:
        """One or more whole events."""
        if not self.is_started:
            await self._start(200, [*_EVENTS, self._id_header])
        await self._send({"type": "http.response.body", "body": events, "more_body": not is_last})

    async def fail(self, error: ErrorReply) -> None:
        """The error as body, or as last event when the answer has begun."""
        if self.is_started:
            await self.events(b"data: " + error.body + b"\n\n", is_last=True)
        else:
            await self.body(error.body, status=error.status, headers=error.headers)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.is_started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
