"""Data plane between hosts, sender's end: frames over one connection to the receiver."""

import secrets
import socket
from collections.abc import Sequence
from itertools import product

import numpy as np
import xxhash

from engine.errors import (
    IsthmusError,
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
)
from kv_transfer import stream
from kv_transfer.blocks import BlockSource, SlotRange
from kv_transfer.frame import (
    ANSWER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushStatus,
    answer_from,
)
from kv_transfer.plane import WritePermit
from kv_transfer.reshard import Transfer

_ERROR_OF: dict[PushStatus, type[IsthmusError]] = {
    PushStatus.LEASE_LOST: KvLeaseLostError,
    PushStatus.CORRUPT: KvCorruptionError,
    PushStatus.REFUSED: LayoutMismatchError,
}


class TcpWriter:
    """Connects with the first write, and with the next one when the connection is gone."""

    name = "tcp"

    def __init__(self, address: tuple[str, int], *, timeout_s: float, has_checksums: bool) -> None:
        self._address = address
        self._timeout_s = timeout_s
        self._has_checksums = has_checksums
        self._socket: socket.socket | None = None
        self._writer_id = secrets.randbits(64)
        self._num_pushes = 0

    def write(
        self,
        permit: WritePermit,
        source: BlockSource,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
    ) -> int:
        frames = list(product(parts, transfers))
        if not frames:
            return 0
        sock = self._socket or self._connect()
        try:
            return self._write(sock, permit, source, frames)
        except OSError as error:
            raise PeerUnavailableError(f"{self._peer}: {error}") from error

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @property
    def _peer(self) -> str:
        return "data port {}:{}".format(*self._address)

    def _connect(self) -> socket.socket:
        try:
            sock = socket.create_connection(self._address, timeout=self._timeout_s)
        except OSError as error:
            raise PeerUnavailableError(f"{self._peer}: {error}") from error
        stream.prepare(sock)
        self._socket = sock
        return sock

    def _write(
        self,
        sock: socket.socket,
        permit: WritePermit,
        source: BlockSource,
        frames: Sequence[tuple[SlotRange, Transfer]],
    ) -> int:
        self._num_pushes += 1
        num_bytes = 0
        status = None
        try:
            for index, frame in enumerate(frames):
                permit.check()
                is_last = index == len(frames) - 1
                num_bytes += self._send_frame(sock, permit, source, *frame, is_last=is_last)
            status = self._await_answer(sock, permit)
        finally:
            if status is not PushStatus.WRITTEN:
                self.close()  # the receiver drops what it has of an unfinished frame
        if status is not PushStatus.WRITTEN:
            raise _ERROR_OF[status](
                f"{self._peer} answered {status.name} for lease {permit.lease_id}"
            )
        return num_bytes

    def _send_frame(
        self,
        sock: socket.socket,
        permit: WritePermit,
        source: BlockSource,
        part: SlotRange,
        transfer: Transfer,
        *,
        is_last: bool,
    ) -> int:
        payload = np.ascontiguousarray(source.slots(part, transfer.source)).reshape(-1)
        flags = FrameFlag(0)
        checksum = 0
        if is_last:
            flags |= FrameFlag.LAST
        if self._has_checksums:
            flags |= FrameFlag.CHECKSUM
            checksum = xxhash.xxh3_64_intdigest(payload.data)
        header = FrameHeader(
            flags=flags,
            writer_id=self._writer_id,
            push=self._num_pushes,
            lease_id=permit.lease_id,
            epoch=permit.epoch,
            block_id=part.remote_block_id,
            first_slot=part.remote_slot,
            num_slots=part.num_slots,
            box=transfer.target,
            num_bytes=payload.nbytes,
            checksum=checksum,
        )
        stream.send(
            sock, header.to_bytes(), payload.data, timeout_s=self._timeout_s, check=permit.check
        )
        return payload.nbytes

    def _await_answer(self, sock: socket.socket, permit: WritePermit) -> PushStatus:
        data = bytearray(ANSWER_BYTES)
        is_open = stream.receive(
            sock, memoryview(data), timeout_s=self._timeout_s, check=permit.check
        )
        if not is_open:
            raise ConnectionResetError("closed before the push was answered")
        try:
            answer = answer_from(data)
        except FrameError as error:
            raise ConnectionResetError(f"unreadable answer ({error})") from error
        if (answer.push, answer.lease_id) != (self._num_pushes, permit.lease_id):
            raise ConnectionResetError("answer to another push")
        return answer.status
