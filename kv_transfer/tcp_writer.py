"""Data plane between hosts, sender's end: frames over one or several connections to a receiver."""

import secrets
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from engine.errors import (
    IsthmusError,
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
)
from kv_transfer.blocks import BlockSource
from kv_transfer.frame import MAX_BLOCKS, PushStatus
from kv_transfer.gate import FRAME_BYTES
from kv_transfer.plane import WritePermit
from kv_transfer.reshard import Transfer
from kv_transfer.runs import Piece
from kv_transfer.slot_ranges import SlotRange
from kv_transfer.tcp_connection import OtherFailedError, Push, SendingConnection

_ERROR_OF: dict[PushStatus, type[IsthmusError]] = {
    PushStatus.LEASE_LOST: KvLeaseLostError,
    PushStatus.CORRUPT: KvCorruptionError,
    PushStatus.REFUSED: LayoutMismatchError,
}


class TcpWriter:
    """Spreads the frames of a push over its connections, a thread for each."""

    name = "tcp"

    def __init__(
        self,
        address: tuple[str, int],
        *,
        timeout_s: float,
        has_checksums: bool,
        num_connections: int = 1,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            address: host and port of the receiver's listener.
            timeout_s: longest time without progress.
            has_checksums: send one with each frame.
            num_connections: at most so many; each frame of a push may have one of its own.
            tls: to speak it.
        """
        self._peer = "data port {}:{}".format(*address)
        self._writer_id = secrets.randbits(64)
        self._num_pushes = 0
        self._connections = [
            SendingConnection(address, timeout_s=timeout_s, has_checksums=has_checksums, tls=tls)
            for _ in range(num_connections)
        ]
        self._threads: ThreadPoolExecutor | None = None

    def write(
        self,
        permit: WritePermit,
        source: BlockSource,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
    ) -> int:
        frames = [
            frame
            # Frames name slots of the target's blocks: only the receiver needs its layout.
            for piece in source.pieces_for(source.blocks.layout, parts, transfers)
            for frame in piece.cut(max(1, min(MAX_BLOCKS, FRAME_BYTES // piece.source.block_bytes)))
        ]
        if not frames:
            return 0
        self._num_pushes += 1
        push = Push(self._writer_id, self._num_pushes, permit, source, threading.Event())
        used = self._connections[: len(frames)]
        shares = [frames[index :: len(used)] for index in range(len(used))]
        others = [
            self._pool().submit(self._write, push, connection, share)
            for connection, share in zip(used[1:], shares[1:], strict=True)
        ]
        try:
            self._write(push, used[0], shares[0])
        finally:
            wait(others)
        for other in others:
            other.result()
        return sum(frame.num_bytes for frame in frames)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _write(self, push: Push, connection: SendingConnection, frames: Sequence[Piece]) -> None:
        status = None
        try:
            status = connection.write(push, frames)
        except OtherFailedError:
            return
        except OSError as error:
            raise PeerUnavailableError(f"{self._peer}: {error}") from error
        finally:
            if status is not PushStatus.WRITTEN:
                push.is_broken.set()
                connection.close()  # the receiver drops what it has of an unfinished frame
        if status is not PushStatus.WRITTEN:
            raise _ERROR_OF[status](
                f"{self._peer} answered {status.name} for lease {push.permit.lease_id}"
            )

    def _pool(self) -> ThreadPoolExecutor:
        if self._threads is None:
            num_threads = len(self._connections) - 1
            self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="kv-write-more")
        return self._threads
