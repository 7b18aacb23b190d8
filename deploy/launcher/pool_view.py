"""The pools as a gateway sees them, from its status document."""

import asyncio
from collections import Counter
from collections.abc import Mapping

import msgspec

_POLL_S = 0.05
_MAX_REPLY_BYTES = 1 << 20


class _Worker(msgspec.Struct):
    role: str
    is_connected: bool


class PoolView(msgspec.Struct):
    """What is read of GET /status."""

    workers: list[_Worker]

    def holds(self, counts: Mapping[str, int]) -> bool:
        """Whether so many workers of each role are connected."""
        found = Counter(worker.role for worker in self.workers if worker.is_connected)
        return all(found[role] >= count for role, count in counts.items())


async def pools_seen(address: str, counts: Mapping[str, int]) -> None:
    """Return once the gateway at `address` sees these workers; the caller sets the time limit."""
    while True:
        view = await _read_status(address)
        if view is not None and view.holds(counts):
            return
        await asyncio.sleep(_POLL_S)


async def _read_status(address: str) -> PoolView | None:
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port), limit=_MAX_REPLY_BYTES)
    except OSError:
        return None
    try:
        writer.write(f"GET /status HTTP/1.0\r\nHost: {address}\r\n\r\n".encode())
        head, _, body = (await reader.read(-1)).partition(b"\r\n\r\n")
        return msgspec.json.decode(body, type=PoolView) if b" 200 " in head[:20] else None
    except (OSError, msgspec.MsgspecError):
        return None
    finally:
        writer.close()
