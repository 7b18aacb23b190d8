"""One connection of a sending rank to a receiver's data port: frames out, an answer back."""

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from kv_transfer import stream, wire
from kv_transfer.blocks import BlockSource
from kv_transfer.frame import (
    ANSWER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushStatus,
    answer_from,
    checksum_to_bytes,
    ids_to_bytes,
)
from kv_transfer.payload import PIECE_BYTES, TOGETHER_BYTES, cut, digest
from kv_transfer.plane import WritePermit
from kv_transfer.runs import Piece
from kv_transfer.wire import Runs


class OtherFailedError(Exception):
    """Another connection of the push has failed, and says why."""


@dataclass(slots=True)
class Push:
    """What the connections that share a push have in common."""

    writer_id: int
    number: int
    permit: WritePermit
    source: BlockSource
    is_broken: bool = False
    """Set by the connection that fails first, in its thread."""

    def check(self) -> None:
        """Raises what `WritePermit.check` raises, or OtherFailedError."""
        self.permit.check()
        if self.is_broken:
            raise OtherFailedError


@dataclass(frozen=True, slots=True)
class FrameContent:
    """What a frame says beyond its header and block ids."""

    sent: Sequence[memoryview]
    """Behind them on the connection."""
    checked: Sequence[memoryview]
    """The payload, for its checksum; the same object where it is what is sent."""
    runs: Runs | None = None
    """The payload, where it goes by `wire`; nothing else is sent then."""


class FrameSource(Protocol):
    """How the payload of a frame gets to the receiver. One connection's; one thread's."""

    def greeting(self) -> bytes:
        """Goes first over a new connection; may be empty."""

    def content(self, sock: socket.socket, push: Push, frame: Piece) -> FrameContent:
        """Valid until the next call."""

    def await_answer(self, sock: socket.socket, push: Push) -> None:
        """Do what the receiver needs until it has answered; may return at once."""


class SendingConnection:
    """Connects with the first write, and with the next one after `close`."""

    def __init__(
        self,
        address: tuple[str, int],
        source: FrameSource,
        *,
        timeout_s: float,
        has_checksums: bool,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._address = address
        self._source = source
        self._timeout_s = timeout_s
        self._has_checksums = has_checksums
        self._tls = tls
        self._socket: socket.socket | None = None

    def write(self, push: Push, frames: Sequence[Piece]) -> PushStatus:
        """Send `frames` and wait for the answer.

        Raises:
            OSError: the connection is of no use any more; so after all that `Push.check` raises.
        """
        sock = self._socket
        if sock is None:
            sock = self._socket = self._connect()
            if greeting := self._source.greeting():
                stream.send(sock, greeting, timeout_s=self._timeout_s, check=push.check)
        tail = b""
        for index, frame in enumerate(frames):
            push.check()
            tail = self._send(sock, push, frame, tail, is_last=index == len(frames) - 1)
        if tail:
            stream.send(sock, tail, timeout_s=self._timeout_s, check=push.check)
        self._source.await_answer(sock, push)
        return self._receive_answer(sock, push)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _connect(self) -> socket.socket:
        sock = stream.connect(self._address, timeout_s=self._timeout_s)
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

    def _send(
        self, sock: socket.socket, push: Push, frame: Piece, before: bytes, *, is_last: bool
    ) -> bytes:
        """Send what is left of the frame before, and this one; returns what is left of that.

        Each system call may have to wake the receiver, which here costs more than the bytes.
        """
        content = self._source.content(sock, push, frame)
        ids = ids_to_bytes(frame.target_blocks)
        flags = FrameFlag.LAST if is_last else FrameFlag(0)
        header = FrameHeader(
            flags=flags | FrameFlag.CHECKSUM if self._has_checksums else flags,
            writer_id=push.writer_id,
            push=push.number,
            lease_id=push.permit.lease_id,
            epoch=push.permit.epoch,
            num_blocks=len(frame.target_blocks),
            first_slot=frame.target.first_slot,
            num_slots=frame.target.num_slots,
            box=frame.target.box,
            num_bytes=frame.num_bytes,
            ids_checksum=xxhash.xxh3_64_intdigest(ids),
        )

        def send(*buffers: bytes | memoryview) -> None:
            stream.send(sock, *buffers, timeout_s=self._timeout_s, check=push.check)

        head = before + header.to_bytes() + ids
        if content.runs is not None:
            checksum = wire.send(
                sock,
                head,
                content.runs,
                has_checksum=self._has_checksums,
                timeout_s=self._timeout_s,
                check=push.check,
            )
            return checksum_to_bytes(checksum) if self._has_checksums else b""
        if not self._has_checksums:
            send(head, *content.sent)
            return b""
        if content.checked is not content.sent or frame.num_bytes <= TOGETHER_BYTES:
            send(head, *content.sent, checksum_to_bytes(digest(content.checked)))
            return b""
        hashed = xxhash.xxh3_64()
        for piece in cut(content.checked, PIECE_BYTES):
            send(head, *piece) if head else send(*piece)
            head = b""
            for view in piece:
                hashed.update(view)
        return checksum_to_bytes(hashed.intdigest())

    def _receive_answer(self, sock: socket.socket, push: Push) -> PushStatus:
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
