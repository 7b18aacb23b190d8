"""Whole messages over a blocking TCP socket that wakes up now and then to look around."""

import contextlib
import socket
import ssl
import struct
import time
from collections.abc import Callable, Sequence

TICK_S = 0.2
"""How often a blocked call looks whether it should go on."""
MAX_BUFFERS = 1024
"""In one system call (IOV_MAX)."""
KEEPALIVE_IDLE_S = 30
KEEPALIVE_INTERVAL_S = 10
KEEPALIVE_PROBES = 3
"""A host that is silent for a minute, though nothing is asked of it, has vanished."""


WINDOW_BYTES = 1 << 20
"""At least so much may be on its way: several times what the C library lets a receiver sleep for.
"""
HERE_CONGESTION = b"reno"
"""Nothing between two ends on one host is congested: what paces itself for the sake of a network
(bbr) only waits there. Every Linux has this one, and lets everybody have it."""


class StalledError(OSError):
    """The peer moved no byte for too long."""


class HandshakeError(OSError):
    """The peer speaks no TLS, or shows no certificate that is trusted."""


def connect(address: tuple[str, int], *, timeout_s: float) -> socket.socket:
    """A connection to the first of the host's addresses that takes one; not prepared yet."""
    failure = OSError(f"no address of {address[0]}")
    for family, kind, protocol, _, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            if _is_here(family, place):
                with contextlib.suppress(OSError):  # a sandbox has none to choose
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, HERE_CONGESTION)
            sock.settimeout(timeout_s)
            sock.connect(place)
        except OSError as error:
            sock.close()
            failure = error
        else:
            return sock
    raise failure


def prepare(sock: socket.socket) -> None:
    """Blocking calls return after TICK_S without progress; small messages go at once.

    A host that vanishes without a word is found out, also by those who wait for it for ever.
    """
    sock.settimeout(None)
    tick = struct.pack("ll", 0, round(TICK_S * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, tick)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, tick)
    # A buffer for whatever the receiver may wait for, which then still grows by itself; SO_RCVBUF
    # would fix its size.
    for num_bytes in (WINDOW_BYTES, 1):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, num_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def secured(sock: socket.socket, context: ssl.SSLContext, *, is_server: bool) -> ssl.SSLSocket:
    """The same connection with TLS, once `shake_hands` has returned; `sock` is of no more use."""
    wrapped = context.wrap_socket(sock, server_side=is_server, do_handshake_on_connect=False)
    # The tick of `prepare` would not be heard of: a blocking SSL socket tries again by itself.
    wrapped.settimeout(TICK_S)
    return wrapped


def shake_hands(sock: ssl.SSLSocket, *, timeout_s: float) -> None:
    """Raises HandshakeError also when it takes too long."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            sock.do_handshake()
        except OSError as error:
            if not _is_tick(error):
                raise HandshakeError(f"TLS: {error}") from error
            if time.monotonic() > end_s:
                raise HandshakeError(f"no TLS handshake within {timeout_s} s") from None
        else:
            return


def shutdown(sock: socket.socket) -> None:
    """End both directions; whoever is blocked on the socket finds it closed. Any thread."""
    with contextlib.suppress(OSError):
        # Not SSLSocket's own: the blocked thread would go on as if there had been no TLS.
        socket.socket.shutdown(sock, socket.SHUT_RDWR)


def receive(
    sock: socket.socket,
    *targets: memoryview,
    timeout_s: float | None,
    check: Callable[[], None] | None = None,
) -> bool:
    """Fill `targets`, one after the other; False when the peer has closed before the first byte.

    Args:
        sock: prepared.
        targets: flat bytes, none empty.
        timeout_s: longest time without a byte; None waits for the first byte for ever.
        check: called on every tick; raises to give up.

    Raises:
        StalledError: no byte came for `timeout_s`.
        ConnectionResetError: the peer closed in the middle.
    """
    left = list(targets)
    index = 0
    has_begun = False
    progress_s = time.monotonic()
    while index < len(left):
        try:
            count = _receive_some(sock, left[index : index + MAX_BUFFERS])
        except OSError as error:
            if not _is_tick(error):
                raise
            if check is not None:
                check()
            if timeout_s is not None and time.monotonic() - progress_s > timeout_s:
                raise StalledError(f"no byte for {timeout_s} s") from None
            continue
        if count == 0:
            if not has_begun:
                return False
            raise ConnectionResetError("closed in the middle of a message")
        has_begun = True
        index = _advance(left, index, count)
        progress_s = time.monotonic()
    return True


def send(
    sock: socket.socket,
    *buffers: bytes | memoryview,
    timeout_s: float,
    check: Callable[[], None],
) -> None:
    """Send all of `buffers`, none of them empty; raises as `receive`."""
    left = [memoryview(buffer) for buffer in buffers]
    index = 0
    progress_s = time.monotonic()
    while index < len(left):
        try:
            count = _send_some(sock, left[index : index + MAX_BUFFERS])
        except OSError as error:
            if not _is_tick(error):
                raise
            check()
            if time.monotonic() - progress_s > timeout_s:
                raise StalledError(f"no byte taken for {timeout_s} s") from None
            continue
        index = _advance(left, index, count)
        progress_s = time.monotonic()


def _is_here(family: int, place: tuple[object, ...]) -> bool:
    """Whether what is sent to `place` stays on this host; nothing is sent to find out."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(place)
        return bool(probe.getsockname()[0] == probe.getpeername()[0])


def _is_tick(error: OSError) -> bool:
    """Nothing moved for TICK_S. Of a host that has vanished, ETIMEDOUT tells."""
    if isinstance(error, TimeoutError):
        return error.errno is None
    return isinstance(error, BlockingIOError | ssl.SSLWantReadError | ssl.SSLWantWriteError)


def _receive_some(sock: socket.socket, targets: Sequence[memoryview]) -> int:
    if isinstance(sock, ssl.SSLSocket):
        return sock.recv_into(targets[0])
    if len(targets) == 1:
        return sock.recv_into(targets[0], 0, socket.MSG_WAITALL)
    return sock.recvmsg_into(targets, 0, socket.MSG_WAITALL)[0]


def _send_some(sock: socket.socket, buffers: Sequence[memoryview]) -> int:
    return sock.send(buffers[0]) if isinstance(sock, ssl.SSLSocket) else sock.sendmsg(buffers)


def _advance(left: list[memoryview], index: int, count: int) -> int:
    """The first buffer that is not done after `count` more bytes; what is done of it is cut off."""
    while index < len(left) and count >= len(left[index]):
        count -= len(left[index])
        index += 1
    if count:
        left[index] = left[index][count:]
    return index
