"""Data plane over NIXL, sender's end: says where the blocks are, and the receiver reads them."""

import contextlib
import select
import socket
import time

from engine.kv_cache.layout import KvLayout
from kv_transfer.blocks import HostBlocks
from kv_transfer.frame_writer import FrameWriter
from kv_transfer.nixl_agent import POLL_S, NixlAgent
from kv_transfer.nixl_intake import FETCH_BYTES, WHOLE_RUN
from kv_transfer.nixl_wire import addresses_to_bytes, greeting
from kv_transfer.runs import Piece
from kv_transfer.sending_connection import FrameContent, Push, SendingConnection
from kv_transfer.stream import TICK_S

LINGER_S = 0.5
"""A read that is under way when a push is given up keeps the receiver's blocks until it ends."""


class NixlWriter(FrameWriter):
    """One connection; its agent lives as long as it does."""

    def __init__(
        self,
        address: tuple[str, int],
        blocks: HostBlocks,
        target_layout: KvLayout,
        *,
        timeout_s: float,
        has_checksums: bool,
    ) -> None:
        """Raises PeerUnavailableError where NIXL cannot be used."""
        self._agent = NixlAgent(blocks.flat)
        connection = SendingConnection(
            address,
            _FetchedSource(self._agent),
            timeout_s=timeout_s,
            has_checksums=has_checksums,
            tls=None,
        )
        super().__init__(
            "nixl", address, [connection], frame_bytes=FETCH_BYTES, target_layout=target_layout
        )

    def close(self) -> None:
        super().close()
        self._agent.close()


class _FetchedSource:
    """Names the runs that the receiver is to read."""

    sends_blocks = False

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent

    def greeting(self) -> bytes:
        return greeting(self._agent.metadata)

    def content(self, push: Push, frame: Piece) -> FrameContent:
        grain = min(frame.source.grain(WHOLE_RUN), frame.target.grain(WHOLE_RUN))
        offsets, lengths = frame.source.runs_of(frame.source_blocks, grain, WHOLE_RUN)
        pool = push.source.blocks.flat.data
        runs = zip(offsets.tolist(), lengths.tolist(), strict=True)
        return FrameContent(
            [memoryview(addresses_to_bytes(self._agent.addresses(offsets)))],
            [pool[offset : offset + length] for offset, length in runs],
        )

    def await_answer(self, sock: socket.socket, push: Push) -> None:
        """Serve the receiver's reads; its lease is what ends the wait for one that is stuck."""
        num_polls_per_tick = round(TICK_S / POLL_S)
        num_polls = 0
        try:
            while not select.select([sock], [], [], POLL_S)[0]:
                self._agent.progress()
                num_polls += 1
                if num_polls % num_polls_per_tick == 0:
                    push.check()
        finally:
            self._linger(sock)

    def _linger(self, sock: socket.socket) -> None:
        """Without an answer, serve for a moment the read that may be under way."""
        end_s = time.monotonic() + LINGER_S
        while not _is_answered(sock) and time.monotonic() < end_s:
            self._agent.progress()
            time.sleep(POLL_S)


def _is_answered(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    return False
