"""Writes in frames over connections to a receiver's data port, whatever brings their payload."""

import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait

from engine.errors import (
    IsthmusError,
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
)
from engine.kv_cache.layout import KvLayout
from kv_transfer.blocks import BlockSource
from kv_transfer.frame import PushStatus
from kv_transfer.gate import blocks_of_frame
from kv_transfer.plane import WritePermit
from kv_transfer.reshard import Transfer
from kv_transfer.runs import Piece, PiecePlan
from kv_transfer.sending_connection import OtherFailedError, Push, SendingConnection
from kv_transfer.slot_ranges import SlotRange

_ERROR_OF: dict[PushStatus, type[IsthmusError]] = {
    PushStatus.LEASE_LOST: KvLeaseLostError,
    PushStatus.CORRUPT: KvCorruptionError,
    PushStatus.REFUSED: LayoutMismatchError,
}


class FrameWriter:
    """Spreads the frames of a push over its connections, a thread for each."""

    is_copying = False

    def __init__(
        self,
        name: str,
        address: tuple[str, int],
        connections: Sequence[SendingConnection],
        *,
        frame_bytes: int,
        target_layout: KvLayout | None = None,
    ) -> None:
        """Nothing is opened yet.

        Args:
            name: of the data plane.
            address: where the connections go, for texts.
            connections: at most so many are used; each frame of a push may have one of its own.
            frame_bytes: most content of a frame, where one block is not larger.
            target_layout: of the receiver's pool, where frames depend on it.
        """
        self.name = name
        self._peer = "data port {}:{}".format(*address)
        self._connections = connections
        self._frame_bytes = frame_bytes
        self._target_layout = target_layout
        self._writer_id = secrets.randbits(64)
        self._num_pushes = 0
        self._plan: PiecePlan | None = None
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
            for piece in self._plan_for(source).pieces(parts, transfers, source.index_of)
            for frame in piece.cut(blocks_of_frame(piece.source.block_bytes, self._frame_bytes))
        ]
        if not frames:
            return 0
        self._num_pushes += 1
        push = Push(self._writer_id, self._num_pushes, permit, source)
        if len(frames) == 1:
            self._write(push, self._connections[0], frames)
            return frames[0].num_bytes
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

    def _plan_for(self, source: BlockSource) -> PiecePlan:
        layout = source.blocks.layout
        if self._plan is None or self._plan.source_layout is not layout:
            self._plan = PiecePlan(layout, self._target_layout or layout)
        return self._plan

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
                push.is_broken = True
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
