"""Sockets of the data plane, plain and with TLS: nothing on them waits longer than it should."""

import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from kv_transfer import stream
from kv_transfer.config import TransferConfig
from kv_transfer.tls import client_context, server_context
from tests.fakes.tls import SECURED

WAIT_S = 10.0
TLS = TransferConfig(**SECURED)
MORE_THAN_FITS = 32 << 20
both = pytest.mark.parametrize("is_secured", [False, True], ids=["plain", "tls"])


class GivenUpError(Exception):
    """What a check raises."""


def give_up() -> None:
    raise GivenUpError


def go_on() -> None:
    pass


def outcome_of(call: Callable[[], object]) -> object:
    """What it returns or raises; it has to end."""
    outcome: list[object] = []

    def run() -> None:
        try:
            outcome.append(call())
        except (OSError, GivenUpError) as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT_S)
    assert not thread.is_alive(), "it waits for ever"
    return outcome[0]


@contextmanager
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Of a TCP connection: the client's and the server's."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
        listener.accept()[0] as server,
    ):
        stream.prepare(client)
        stream.prepare(server)
        yield client, server


def secured(sock: socket.socket, *, is_server: bool) -> ssl.SSLSocket:
    context = (server_context if is_server else client_context)(TLS)
    assert context is not None
    return stream.secured(sock, context, is_server=is_server)


@contextmanager
def connected(*, is_secured: bool) -> Iterator[tuple[socket.socket, socket.socket]]:
    with ends() as (client, server):
        if not is_secured:
            yield client, server
            return
        with (
            secured(client, is_server=False) as secured_client,
            secured(server, is_server=True) as secured_server,
        ):
            thread = threading.Thread(
                target=stream.shake_hands, args=(secured_server,), kwargs={"timeout_s": WAIT_S}
            )
            thread.start()
            stream.shake_hands(secured_client, timeout_s=WAIT_S)
            thread.join()
            yield secured_client, secured_server


@pytest.mark.parametrize("is_server", [False, True], ids=["client", "server"])
def test_a_handshake_with_a_silent_peer_ends(*, is_server: bool) -> None:
    with ends() as pair, secured(pair[is_server], is_server=is_server) as sock:
        error = outcome_of(lambda: stream.shake_hands(sock, timeout_s=0.1))
        assert isinstance(error, stream.HandshakeError)
        assert "within 0.1 s" in str(error)


@both
def test_a_silent_sender_is_not_waited_for(*, is_secured: bool) -> None:
    with connected(is_secured=is_secured) as (client, server):
        client.sendall(b"half")
        target = memoryview(bytearray(8))
        stalled = outcome_of(lambda: stream.receive(server, target, timeout_s=0.1))
        assert isinstance(stalled, stream.StalledError)


@both
def test_whoever_receives_may_give_up(*, is_secured: bool) -> None:
    with connected(is_secured=is_secured) as (_, server):
        target = memoryview(bytearray(8))
        outcome = outcome_of(lambda: stream.receive(server, target, timeout_s=None, check=give_up))
        assert isinstance(outcome, GivenUpError)


@both
@pytest.mark.parametrize(
    ("timeout_s", "check", "error"),
    [(0.1, go_on, stream.StalledError), (WAIT_S, give_up, GivenUpError)],
    ids=["stalled", "given up"],
)
def test_a_receiver_that_reads_nothing_is_not_waited_for(
    timeout_s: float, check: Callable[[], None], error: type[Exception], *, is_secured: bool
) -> None:
    with connected(is_secured=is_secured) as (client, _):
        data = bytes(MORE_THAN_FITS)
        outcome = outcome_of(lambda: stream.send(client, data, timeout_s=timeout_s, check=check))
        assert isinstance(outcome, error)


@both
def test_what_had_to_wait_arrives_whole(*, is_secured: bool) -> None:
    """TLS must be given the same bytes again that it did not take."""
    data = os.urandom(1 << 20) * (MORE_THAN_FITS >> 20)
    has_waited = threading.Event()
    arrived = bytearray(len(data))
    with connected(is_secured=is_secured) as (client, server):

        def receive() -> None:
            has_waited.wait(WAIT_S)
            stream.receive(server, memoryview(arrived), timeout_s=WAIT_S)

        thread = threading.Thread(target=receive)
        thread.start()
        stream.send(client, data, timeout_s=WAIT_S, check=has_waited.set)
        thread.join(WAIT_S)
    assert has_waited.is_set()
    assert arrived == data


@both
def test_shutting_a_socket_down_wakes_who_waits_on_it(*, is_secured: bool) -> None:
    with connected(is_secured=is_secured) as (_, server):
        is_waiting = threading.Event()

        def shut_down() -> None:
            is_waiting.wait(WAIT_S)
            stream.shutdown(server)

        thread = threading.Thread(target=shut_down)
        thread.start()
        target = memoryview(bytearray(8))
        begun_s = time.monotonic()
        outcome = outcome_of(
            lambda: stream.receive(server, target, timeout_s=None, check=is_waiting.set)
        )
        thread.join()
        assert outcome is False or isinstance(outcome, OSError)
        assert time.monotonic() - begun_s < WAIT_S / 2


@both
def test_a_host_that_vanishes_is_looked_for(*, is_secured: bool) -> None:
    with connected(is_secured=is_secured) as pair:
        for sock in pair:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            minute_s = sock.getsockopt(
                socket.IPPROTO_TCP, socket.TCP_KEEPIDLE
            ) + stream.KEEPALIVE_PROBES * sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL)
            assert minute_s == 60
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3


def test_a_host_that_has_vanished_is_not_waited_for(monkeypatch) -> None:
    """Python calls both TimeoutError: that nothing came for a tick, and ETIMEDOUT."""
    errors = [TimeoutError(errno.ETIMEDOUT, "Connection timed out"), TimeoutError("timed out")]

    def receive(sock: object, targets: object) -> int:
        raise errors.pop()

    monkeypatch.setattr(stream, "_receive_some", receive)
    with (
        socket.socket() as sock,
        pytest.raises(TimeoutError, match="Connection timed out"),
    ):
        stream.receive(sock, memoryview(bytearray(8)), timeout_s=None)
    assert not errors
