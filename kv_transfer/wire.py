"""Frames over plain sockets: one call of the C library each, which takes the checksum, too."""

import ctypes
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kv_transfer.copying import LIBRARY_PATH, Bytes, Offsets
from kv_transfer.runs import BlockRuns
from kv_transfer.stream import StalledError

logger = logging.getLogger(__name__)

LEAST_BYTES = 241
"""Of a payload that goes this way: XXH3 of less is another algorithm."""

_DONE, _TICK, _CLOSED, _OUTSIDE, _FAILED = 1, 0, -1, -2, -16
_OUTSIDE_TEXT = "a run lies outside of its pool, or the payload is too short for its checksum"


class _Frame(ctypes.Structure):
    """The first fields of `frame` in wire.c; more of it follow that only that knows."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("pool_bytes", ctypes.c_int64),
        ("block_bytes", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("num_bytes", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("block", ctypes.c_char_p),
        ("num_blocks", ctypes.c_int64),
        ("head", ctypes.c_char_p),
        ("head_bytes", ctypes.c_int64),
        ("has_checksum", ctypes.c_int64),
        ("answer", ctypes.c_void_p),
        ("answer_bytes", ctypes.c_int64),
        ("has_begun", ctypes.c_int64),
        ("num_moved", ctypes.c_int64),
        ("is_sound", ctypes.c_int64),
    )


_Move = Callable[[int, int], int]


@dataclass(frozen=True, slots=True)
class _Library:
    frame_bytes: int
    send: _Move
    receive: _Move
    wait_soon: Callable[[int], None]


def _load() -> _Library | None:
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
        size = library.isthmus_frame_bytes
        moves = (library.isthmus_send_frame, library.isthmus_receive_frame)
        wait_soon = library.isthmus_wait_soon
    except (OSError, AttributeError) as error:  # not built, or older than its sources
        logger.info("KV goes over sockets piece by piece: %s", error)
        return None
    size.restype = ctypes.c_int64
    for move in moves:
        move.restype = ctypes.c_int64
        move.argtypes = (ctypes.c_int, ctypes.c_void_p)
    wait_soon.restype, wait_soon.argtypes = None, (ctypes.c_int,)
    return _Library(size(), *moves, wait_soon)


_native = _load()


def wait_soon(sock: socket.socket) -> None:
    """Stay awake for a moment: what is awaited has mostly been sent already.

    To sleep and be woken takes longer, for the sender as well. The core is anybody's meanwhile.
    """
    if _native is not None and not isinstance(sock, ssl.SSLSocket):
        _native.wait_soon(sock.fileno())


class PoolBlocks(NamedTuple):
    """A frame's payload: the same runs of some blocks, one block after the other."""

    pool: Bytes
    """Flat and contiguous."""
    runs: BlockRuns
    block_ids: Offsets


def wire_of(sock: socket.socket, *, timeout_s: float) -> "Wire | None":
    """How frames go over a connection; None where the C library cannot: with TLS, or without it."""
    if _native is None or isinstance(sock, ssl.SSLSocket):
        return None
    return Wire(_native, sock, timeout_s=timeout_s)


class Wire:
    """One connection and one thread: a frame after the other."""

    def __init__(self, library: _Library, sock: socket.socket, *, timeout_s: float) -> None:
        """`sock`: prepared; `timeout_s`: longest time without progress."""
        self._library = library
        self._socket = sock
        self._timeout_s = timeout_s
        self._memory = ctypes.create_string_buffer(library.frame_bytes)
        self._address = ctypes.addressof(self._memory)
        self._frame = _Frame.from_buffer(self._memory)

    def send(
        self,
        head: bytes,
        blocks: PoolBlocks,
        *,
        has_checksum: bool,
        answer: bytearray,
        check: Callable[[], None],
    ) -> None:
        """Send `head` and `blocks`; then fill `answer`.

        Args:
            head: what goes before.
            blocks: the payload, of LEAST_BYTES or more where it has a checksum.
            has_checksum: the payload's xxh3_64 follows it.
            answer: what then comes back; may be empty.
            check: called when nothing has moved for a tick; raises to give up.

        Raises:
            StalledError: nothing moved for the time-out.
            OSError: the connection is of no use any more; ConnectionResetError: the peer closed.
            IndexError: a run is not inside the pool; nothing was sent.
        """
        frame = self._aim(blocks, has_checksum=has_checksum)
        frame.head, frame.head_bytes = head, len(head)
        space = (ctypes.c_char * len(answer)).from_buffer(answer) if answer else None
        frame.answer = None if space is None else ctypes.addressof(space)
        frame.answer_bytes = len(answer)
        self._move(self._library.send, check)

    def receive(self, blocks: PoolBlocks, *, has_checksum: bool) -> bool:
        """Fill `blocks`; False when they are not as their checksum says.

        Raises as `send`.
        """
        frame = self._aim(blocks, has_checksum=has_checksum)
        self._move(self._library.receive, None)
        return bool(frame.is_sound)

    def _aim(self, blocks: PoolBlocks, *, has_checksum: bool) -> _Frame:
        frame, pool, runs = self._frame, blocks.pool, blocks.runs
        frame.pool, frame.pool_bytes = pool.ctypes.data, len(pool)
        frame.block_bytes, frame.num_runs = runs.pool_block_bytes, len(runs.lengths)
        frame.offset, frame.num_bytes = runs.addresses
        frame.block, frame.num_blocks = blocks.block_ids.tobytes(), len(blocks.block_ids)
        frame.has_checksum, frame.has_begun = has_checksum, 0
        return frame

    def _move(self, move: _Move, check: Callable[[], None] | None) -> None:
        frame, fd = self._frame, self._socket.fileno()
        num_moved = 0
        progress_s = time.monotonic()
        while (outcome := move(fd, self._address)) != _DONE:
            if outcome == _OUTSIDE:
                raise IndexError(_OUTSIDE_TEXT)
            if outcome == _CLOSED:
                raise ConnectionResetError("closed in the middle of a frame, or before its answer")
            if outcome != _TICK:
                number = int(_FAILED - outcome)
                raise OSError(number, os.strerror(number))
            if check is not None:
                check()
            if frame.num_moved != num_moved:
                num_moved, progress_s = frame.num_moved, time.monotonic()
            elif time.monotonic() - progress_s > self._timeout_s:
                raise StalledError(f"no byte moved for {self._timeout_s} s")
