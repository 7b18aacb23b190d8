"""Data plane between hosts, sender's end: payloads go over the connections themselves."""

import socket
import ssl

import numpy as np

from kv_transfer.copying import Bytes
from kv_transfer.frame_writer import FrameWriter
from kv_transfer.gate import FRAME_BYTES
from kv_transfer.payload import Payload
from kv_transfer.runs import Piece
from kv_transfer.sending_connection import FrameContent, Push, SendingConnection


def tcp_writer(
    address: tuple[str, int],
    *,
    timeout_s: float,
    has_checksums: bool,
    num_connections: int = 1,
    tls: ssl.SSLContext | None = None,
) -> FrameWriter:
    """Opens nothing yet.

    Args:
        address: host and port of the receiver's listener.
        timeout_s: longest time without progress.
        has_checksums: send one with each frame.
        num_connections: over which a push is spread.
        tls: to speak it.
    """
    connections = [
        SendingConnection(
            address, SocketSource(), timeout_s=timeout_s, has_checksums=has_checksums, tls=tls
        )
        for _ in range(num_connections)
    ]
    return FrameWriter("tcp", address, connections, frame_bytes=FRAME_BYTES)


class SocketSource:
    """Sends from the pool, or from a buffer where its parts are short."""

    sends_blocks = True

    def __init__(self) -> None:
        self._scratch: Bytes | None = None

    def greeting(self) -> bytes:
        return b""

    def content(self, push: Push, frame: Piece) -> FrameContent:
        region, pool = frame.source, push.source.blocks.flat
        runs = region.runs_of(frame.source_blocks, region.grain(FRAME_BYTES), FRAME_BYTES)
        payload = Payload(pool, *runs, self._buffer(frame.num_bytes))
        payload.gather()
        views = payload.views()
        return FrameContent(views, views)

    def await_answer(self, sock: socket.socket, push: Push) -> None:
        """Nothing: it has everything."""

    def _buffer(self, num_bytes: int) -> Bytes:
        if self._scratch is None or len(self._scratch) < num_bytes:
            self._scratch = np.empty(max(num_bytes, FRAME_BYTES), np.uint8)
        return self._scratch
