"""What comes over one data connection: frame by frame, each checked against its lease first."""

from typing import Protocol

from kv_transfer import stream
from kv_transfer.copying import Offsets
from kv_transfer.data_listener import Connection
from kv_transfer.frame import (
    BLOCK_ID,
    HEADER_BYTES,
    FrameError,
    FrameHeader,
    PushAnswer,
    PushStatus,
    header_from,
    ids_from,
)
from kv_transfer.gate import Gate
from kv_transfer.wire import wait_soon


class FrameBody(Protocol):
    """How the payload of a frame gets into its blocks."""

    def take(self, header: FrameHeader, block_ids: Offsets) -> PushStatus:
        """Write the blocks; when it returns or raises, nothing is written any more."""

    def skip(self, header: FrameHeader) -> None:
        """Read past what belongs to the frame; nothing is written."""


class FrameReader:
    """Serves a connection in its thread."""

    def __init__(
        self, connection: Connection, gate: Gate, body: FrameBody, *, timeout_s: float
    ) -> None:
        self._connection = connection
        self._gate = gate
        self._body = body
        self._timeout_s = timeout_s
        self._header = bytearray(HEADER_BYTES)

    def run(self) -> None:
        """Until the sender closes; raises FrameError or OSError when it ends otherwise."""
        status = PushStatus.WRITTEN
        # A stranger must show a valid frame soon; a sender may then be idle as long as it likes.
        timeout_s: float | None = self._timeout_s
        while self._receive_header(timeout_s):
            header = header_from(self._header)
            try:
                status = max(status, self._receive_frame(header))
            except FrameError as error:
                is_lost = str(error) in ("unknown_lease", "stale_epoch")
                self._answer(header, PushStatus.LEASE_LOST if is_lost else PushStatus.REFUSED)
                raise
            timeout_s = self._timeout_s
            if header.is_last:
                self._answer(header, status)
                status, timeout_s = PushStatus.WRITTEN, None

    def _receive_header(self, timeout_s: float | None) -> bool:
        sock = self._connection.socket
        wait_soon(sock)  # for the next push, which often follows on the answer
        return stream.receive(sock, memoryview(self._header), timeout_s=timeout_s)

    def _answer(self, header: FrameHeader, status: PushStatus) -> None:
        answer = PushAnswer(status, header.push, header.lease_id)
        self._connection.socket.sendall(answer.to_bytes())

    def _receive_frame(self, header: FrameHeader) -> PushStatus:
        self._gate.check_shape(header)
        block_ids = self._receive_ids(header)
        if not self._gate.enter(header, block_ids.tolist(), self._connection):
            self._body.skip(header)
            return PushStatus.LEASE_LOST
        try:
            return self._body.take(header, block_ids)
        finally:
            self._gate.leave(header, self._connection)

    def _receive_ids(self, header: FrameHeader) -> Offsets:
        data = bytearray(header.num_blocks * BLOCK_ID.itemsize)
        receive_all(self._connection, memoryview(data), timeout_s=self._timeout_s)
        return ids_from(header, data)


def receive_all(connection: Connection, *targets: memoryview, timeout_s: float) -> None:
    """As `stream.receive`; a peer that closes now does so in the middle of a frame."""
    if not stream.receive(connection.socket, *targets, timeout_s=timeout_s):
        raise ConnectionResetError("closed in the middle of a frame")
