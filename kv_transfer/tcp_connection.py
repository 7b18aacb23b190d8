"""One connection of a sending rank to a receiver's data port."""

import socket
import ssl
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from kv_transfer import stream
from kv_transfer.blocks import BlockSource
from kv_transfer.copying import Bytes
from kv_transfer.frame import (
    ANSWER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushStatus,
    answer_from,
    ids_to_bytes,
)
from kv_transfer.gate import FRAME_BYTES
from kv_transfer.payload import Payload, digest
from kv_transfer.plane import WritePermit
from kv_transfer.runs import Piece


class OtherFailedError(Exception):
    """Another connection of the push has failed, and says why."""


@dataclass(frozen=True, slots=True)
class Push:
    """What the connections that share a push have in common."""

    writer_id: int
    number: int
    permit: WritePermit
    source: BlockSource
    is_broken: threading.Event

    def check(self) -> None:
        """Raises what `WritePermit.check` raises, or OtherFailedError."""
        self.permit.check()
        if self.is_broken.is_set():
            raise OtherFailedError


class SendingConnection:
    """Connects with the first write, and with the next one after `close`."""

    def __init__(
        self,
        address: tuple[str, int],
        *,
        timeout_s: float,
        has_checksums: bool,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._has_checksums = has_checksums
        self._tls = tls
        self._socket: socket.socket | None = None
        self._scratch: Bytes | None = None

    def write(self, push: Push, frames: Sequence[Piece]) -> PushStatus:
        """Send `frames` and wait for the answer.

        Raises:
            OSError: the connection is of no use any more; so after all that `Push.check` raises.
        """
        sock = self._socket = self._socket or self._connect()
        for index, frame in enumerate(frames):
            push.check()
            self._send(sock, push, frame, is_last=index == len(frames) - 1)
        return self._await_answer(sock, push)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, timeout=self._timeout_s)
        stream.prepare(sock)
        if self._tls is None:
            return sock
        secured = stream.secured(sock, self._tls, is_server=False)
        try:
            stream.shake_hands(secured, timeout_s=self._timeout_s)
        except OSError:
            secured.close()
            raise
        return secured

    def _send(self, sock: socket.socket, push: Push, frame: Piece, *, is_last: bool) -> None:
        region, pool = frame.source, push.source.blocks.flat
        runs = region.runs_of(frame.source_blocks, region.grain(FRAME_BYTES), FRAME_BYTES)
        payload = Payload(pool, *runs, self._buffer(frame.num_bytes))
        payload.gather()
        views = payload.views()
        header = _header(push, frame)
        if is_last:
            header = replace(header, flags=FrameFlag.LAST)
        if self._has_checksums:
            flags = header.flags | FrameFlag.CHECKSUM
            header = replace(header, flags=flags, checksum=digest(views))
        ids = ids_to_bytes(frame.target_blocks)
        header = replace(header, ids_checksum=xxhash.xxh3_64_intdigest(ids))
        stream.send(
            sock,
            header.to_bytes() + ids,
            *views,
            timeout_s=self._timeout_s,
            check=push.check,
        )

    def _await_answer(self, sock: socket.socket, push: Push) -> PushStatus:
        data = bytearray(ANSWER_BYTES)
        is_open = stream.receive(
            sock, memoryview(data), timeout_s=self._timeout_s, check=push.check
        )
        if not is_open:
            raise ConnectionResetError("closed before the push was answered")
        try:
            answer = answer_from(data)
        except FrameError as error:
            raise ConnectionResetError(f"unreadable answer ({error})") from error
        if (answer.push, answer.lease_id) != (push.number, push.permit.lease_id):
            raise ConnectionResetError("answer to another push")
        return answer.status

    def _buffer(self, num_bytes: int) -> Bytes:
        if self._scratch is None or len(self._scratch) < num_bytes:
            self._scratch = np.empty(max(num_bytes, FRAME_BYTES), np.uint8)
        return self._scratch


def _header(push: Push, frame: Piece) -> FrameHeader:
    return FrameHeader(
        flags=FrameFlag(0),
        writer_id=push.writer_id,
        push=push.number,
        lease_id=push.permit.lease_id,
        epoch=push.permit.epoch,
        num_blocks=len(frame.target_blocks),
        first_slot=frame.target.first_slot,
        num_slots=frame.target.num_slots,
        box=frame.target.box,
        num_bytes=frame.num_bytes,
        checksum=0,
        ids_checksum=0,
    )
