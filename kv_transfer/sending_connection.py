"""One connection of a sending rank to a receiver's data port: frames out, an answer back."""

import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from kv_transfer import stream
from kv_transfer.blocks import BlockSource
from kv_transfer.frame import (
    ANSWER_BYTES,
    FrameError,
    FrameHeader,
    PushStatus,
    answer_from,
    checksum_to_bytes,
    ids_to_bytes,
)
from kv_transfer.payload import PIECE_BYTES, cut, digest
from kv_transfer.plane import WritePermit
from kv_transfer.runs import Piece
from kv_transfer.wire import LEAST_BYTES, PoolBlocks, Wire, wire_of


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


class FrameSource(Protocol):
    """How the payload of a frame gets to the receiver. One connection's; one thread's."""

    sends_blocks: bool
    """Its content is the blocks as they are, which may go by `wire` then."""

    def greeting(self) -> bytes:
        """Goes first over a new connection; may be empty."""

    def content(self, push: Push, frame: Piece) -> FrameContent:
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
        self._wire: Wire | None = None

    def write(self, push: Push, frames: Sequence[Piece]) -> PushStatus:
        """Send `frames` and wait for the answer.

        Raises:
            OSError: the connection is of no use any more; so after all that `Push.check` raises.
        """
        sock = self._socket
        if sock is None:
            sock = self._socket = self._connect()
            if self._source.sends_blocks:
                self._wire = wire_of(sock, timeout_s=self._timeout_s)
            if greeting := self._source.greeting():
                stream.send(sock, greeting, timeout_s=self._timeout_s, check=push.check)
        for frame in frames[:-1]:
            self._send(sock, push, frame)
        answer = bytearray(ANSWER_BYTES)
        self._send(sock, push, frames[-1], answer)
        return _status_from(answer, push)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = self._wire = None

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
        self, sock: socket.socket, push: Push, frame: Piece, answer: bytearray | None = None
    ) -> None:
        """With `answer`, it is the last one, and what comes back is received, too."""
        push.check()
        head = self._head(push, frame, is_last=answer is not None)
        if self._wire is not None and frame.num_bytes >= LEAST_BYTES:
            self._wire.send(
                head,
                PoolBlocks(push.source.blocks.flat, frame.source.block_runs, frame.source_blocks),
                has_checksum=self._has_checksums,
                answer=answer or bytearray(),
                check=push.check,
            )
            return
        self._send_views(sock, push, head, self._source.content(push, frame))
        if answer is not None:
            self._source.await_answer(sock, push)
            if not stream.receive(
                sock, memoryview(answer), timeout_s=self._timeout_s, check=push.check
            ):
                raise ConnectionResetError("closed before the push was answered")

    def _head(self, push: Push, frame: Piece, *, is_last: bool) -> bytes:
        ids = ids_to_bytes(frame.target_blocks)
        header = FrameHeader(
            is_last=is_last,
            has_checksum=self._has_checksums,
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
        return header.to_bytes() + ids

    def _send_views(
        self, sock: socket.socket, push: Push, head: bytes, content: FrameContent
    ) -> None:
        """Each piece is sent while it is in the cache for its checksum, the last one with that."""

        def send(*buffers: bytes | memoryview) -> None:
            stream.send(sock, *buffers, timeout_s=self._timeout_s, check=push.check)

        if not self._has_checksums:
            send(head, *content.sent)
        elif content.checked is not content.sent:
            send(head, *content.sent, checksum_to_bytes(digest(content.checked)))
        else:
            hashed = xxhash.xxh3_64()
            pieces = list(cut(content.sent, PIECE_BYTES))
            for piece in pieces:
                for view in piece:
                    hashed.update(view)
                before = [head] if piece is pieces[0] else []
                behind = [checksum_to_bytes(hashed.intdigest())] if piece is pieces[-1] else []
                send(*before, *piece, *behind)


def _status_from(answer: bytearray, push: Push) -> PushStatus:
    try:
        found = answer_from(answer)
    except FrameError as error:
        raise ConnectionResetError(f"unreadable answer ({error})") from error
    if (found.push, found.lease_id) != (push.number, push.permit.lease_id):
        raise ConnectionResetError("answer to another push")
    return found.status
