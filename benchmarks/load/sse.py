"""Server-sent events from a byte stream; only what OpenAI-compatible servers use of them."""


class SseParser:
    """Cuts bytes into the data of complete events, wherever the bytes were split on their way."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Return the data of each event that `data` completes, in order.

        Lines end with LF or CRLF. Several data lines of one event are joined by LF. Comments and
        other fields are dropped, and an event without data is none.
        """
        *events, self._rest = (self._rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        return [payload for event in events if (payload := _data_of(event)) is not None]


def _data_of(event: bytes) -> bytes | None:
    lines = [
        line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")
    ]
    return b"\n".join(lines) if lines else None
