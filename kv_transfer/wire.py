"""Payloads over plain sockets: one call of the C library a frame, which takes the checksum, too."""

import ctypes
import logging
import os
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kv_transfer.copying import LIBRARY_PATH, Bytes, Offsets
from kv_transfer.payload import TOGETHER_BYTES
from kv_transfer.stream import StalledError

logger = logging.getLogger(__name__)

_DONE, _TICK, _CLOSED, _OUTSIDE, _FAILED = 1, 0, -1, -2, -16
_OUTCOME = "a run lies outside of its pool, or the payload is too short for its checksum"


class _Payload(ctypes.Structure):
    """The first fields of `payload` in wire.c; more of it follow that only that knows."""

    _fields_ = (
        ("pool", ctypes.c_void_p),
        ("pool_bytes", ctypes.c_int64),
        ("offset", ctypes.c_void_p),
        ("num_bytes", ctypes.c_void_p),
        ("num_runs", ctypes.c_int64),
        ("head", ctypes.c_char_p),
        ("head_bytes", ctypes.c_int64),
        ("has_checksum", ctypes.c_int64),
        ("checksum", ctypes.c_uint64),
        ("num_moved", ctypes.c_int64),
    )


_Move = Callable[[int, "ctypes.Array[ctypes.c_char]"], int]


@dataclass(frozen=True, slots=True)
class _Library:
    payload_bytes: int
    send: _Move
    receive: _Move


def _load() -> _Library | None:
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
        size = library.isthmus_payload_bytes
        moves = (library.isthmus_send_payload, library.isthmus_receive_payload)
    except (OSError, AttributeError) as error:  # not built, or older than its sources
        logger.info("KV goes over sockets piece by piece: %s", error)
        return None
    size.restype = ctypes.c_int64
    for move in moves:
        move.restype = ctypes.c_int64
        move.argtypes = (ctypes.c_int, ctypes.c_void_p)
    return _Library(size(), *moves)


_native = _load()


@dataclass(frozen=True, slots=True)
class Runs:
    """Bytes of a pool, here and there; all arrays are flat and contiguous."""

    pool: Bytes
    offsets: Offsets
    lengths: Offsets


def is_native(sock: socket.socket, num_bytes: int) -> bool:
    """Whether a payload goes this way."""
    is_worth_it = num_bytes > TOGETHER_BYTES
    return _native is not None and is_worth_it and not isinstance(sock, ssl.SSLSocket)


def send(
    sock: socket.socket,
    head: bytes,
    runs: Runs,
    *,
    has_checksum: bool,
    timeout_s: float,
    check: Callable[[], None],
) -> int:
    """Send `head` and then the runs; returns their xxh3_64, or 0.

    Args:
        sock: prepared, and `is_native` for the payload.
        head: what goes before.
        runs: what is sent.
        has_checksum: take it.
        timeout_s: longest time without progress.
        check: called when nothing has moved for a tick; raises to give up.

    Raises:
        StalledError: no byte was taken for `timeout_s`.
        OSError: the connection is of no use any more.
        IndexError: a run is not inside the pool; nothing was sent.
    """
    assert _native is not None
    return _move(_native, _native.send, sock, head, runs, has_checksum, timeout_s, check)


def receive(sock: socket.socket, runs: Runs, *, has_checksum: bool, timeout_s: float) -> int:
    """Fill the runs; as `send`. A peer that closes raises ConnectionResetError."""
    assert _native is not None
    return _move(_native, _native.receive, sock, b"", runs, has_checksum, timeout_s, lambda: None)


def _move(
    library: _Library,
    move: _Move,
    sock: socket.socket,
    head: bytes,
    runs: Runs,
    has_checksum: bool,  # noqa: FBT001 - of the two above
    timeout_s: float,
    check: Callable[[], None],
) -> int:
    offsets, lengths = np.ascontiguousarray(runs.offsets), np.ascontiguousarray(runs.lengths)
    memory = ctypes.create_string_buffer(library.payload_bytes)
    payload = _Payload.from_buffer(memory)
    payload.pool, payload.pool_bytes = runs.pool.ctypes.data, len(runs.pool)
    payload.offset, payload.num_bytes = offsets.ctypes.data, lengths.ctypes.data
    payload.num_runs = len(lengths)
    payload.head, payload.head_bytes = head, len(head)
    payload.has_checksum = has_checksum
    num_moved, progress_s = 0, time.monotonic()
    while (outcome := move(sock.fileno(), memory)) != _DONE:
        if outcome == _OUTSIDE:
            raise IndexError(_OUTCOME)
        if outcome == _CLOSED:
            raise ConnectionResetError("closed in the middle of a payload")
        if outcome != _TICK:
            number = int(_FAILED - outcome)
            raise OSError(number, os.strerror(number))
        check()
        if payload.num_moved != num_moved:
            num_moved, progress_s = payload.num_moved, time.monotonic()
        elif time.monotonic() - progress_s > timeout_s:
            raise StalledError(f"no byte moved for {timeout_s} s")
    return int(payload.checksum)
