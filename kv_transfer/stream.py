"""Whole messages over a blocking TCP socket that wakes up now and then to look around."""

import socket
import struct
import time
from collections.abc import Callable

TICK_S = 0.2
"""How often a blocked call looks whether it should go on."""


class StalledError(OSError):
    """The peer moved no byte for too long."""


def prepare(sock: socket.socket) -> None:
    """Blocking calls return after TICK_S without progress; small messages go at once."""
    sock.settimeout(None)
    tick = struct.pack("ll", 0, round(TICK_S * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def receive(
    sock: socket.socket,
    target: memoryview,
    *,
    timeout_s: float | None,
    check: Callable[[], None] | None = None,
) -> bool:
    """Fill `target`; False when the peer has closed before the first byte.

    Args:
        sock: prepared.
        target: flat bytes.
        timeout_s: longest time without a byte; None waits for the first byte for ever.
        check: called on every tick; raises to give up.

    Raises:
        StalledError: no byte came for `timeout_s`.
        ConnectionResetError: the peer closed in the middle.
    """
    got = 0
    progress_s = time.monotonic()
    while got < len(target):
        try:
            count = sock.recv_into(target[got:], 0, socket.MSG_WAITALL)
        except BlockingIOError:
            if check is not None:
                check()
            if timeout_s is not None and time.monotonic() - progress_s > timeout_s:
                raise StalledError(f"no byte for {timeout_s} s") from None
            continue
        if count == 0:
            if got == 0:
                return False
            raise ConnectionResetError("closed in the middle of a message")
        got += count
        progress_s = time.monotonic()
    return True


def send(
    sock: socket.socket,
    header: bytes,
    payload: memoryview,
    *,
    timeout_s: float,
    check: Callable[[], None],
) -> None:
    """Send all of both; raises as `receive`."""
    sent = 0
    total = len(header) + len(payload)
    progress_s = time.monotonic()
    while sent < total:
        rest = (memoryview(header)[sent:], payload[max(0, sent - len(header)) :])
        try:
            sent += sock.sendmsg(rest)
            progress_s = time.monotonic()
        except BlockingIOError:
            check()
            if time.monotonic() - progress_s > timeout_s:
                raise StalledError(f"no byte taken for {timeout_s} s") from None
