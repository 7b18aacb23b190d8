"""Payloads that the C library moves: the same bytes and checksums as without it."""

import array
import fcntl
import random
import socket
import termios
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from engine.kernels.native_library import NativeLibrary
from kv_transfer import stream, wire
from kv_transfer.stream import StalledError
from kv_transfer.wire import Runs

WAIT_S = 10.0
POOL_BYTES = 3 << 20
MORE_THAN_FITS = 64 << 20
HEAD = bytes(range(100))

pytestmark = pytest.mark.skipif(wire._native is None, reason="the C library is not built")


class GivenUpError(Exception):
    """What a check raises."""


def go_on() -> None:
    pass


def give_up() -> None:
    raise GivenUpError


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        stream.connect(listener.getsockname(), timeout_s=WAIT_S) as client,
        listener.accept()[0] as server,
    ):
        stream.prepare(client)
        stream.prepare(server)
        yield client, server


def runs_of(lengths: list[int], seed: int) -> Runs:
    """Runs that do not overlap, in no order, in a pool of noise."""
    dice = np.random.default_rng(seed)
    pool = dice.integers(0, 256, POOL_BYTES, np.uint8)
    order = dice.permutation(len(lengths))
    gap = (POOL_BYTES - sum(lengths)) // len(lengths)
    offsets, first = np.zeros(len(lengths), np.int64), 0
    for index in order.tolist():
        offsets[index] = first
        first += lengths[index] + gap
    return Runs(pool, offsets, np.array(lengths, np.int64))


def joined(runs: Runs) -> bytes:
    pairs = zip(runs.offsets.tolist(), runs.lengths.tolist(), strict=True)
    return b"".join(runs.pool[first : first + length].tobytes() for first, length in pairs)


def some_lengths() -> list[list[int]]:
    dice = random.Random(1)
    edges = [241, 255, 256, 257, 1023, 1024, 1025, 1088, 2048, 2049, 65536, 1 << 20]
    scattered = [
        [dice.choice((1, 3, 63, 64, 65, 128, 1000, 4096)) for _ in range(dice.randrange(5, 1500))]
        for _ in range(12)
    ]
    return [[edge] for edge in edges] + [[1] * 300, [700_000, 5, 900_000], *scattered]


@pytest.fixture(params=["fastest", "portable"])
def level(request) -> Iterator[None]:
    """Of instructions; the slowest is what every CPU has."""
    library = NativeLibrary()
    num_levels = len(library.level_names())
    library.use_level(0 if request.param == "portable" else num_levels - 1)
    yield
    library.use_level(num_levels - 1)


@pytest.mark.usefixtures("level")
def test_runs_arrive_with_the_checksum_that_xxhash_takes(ends) -> None:
    client, server = ends
    for seed, lengths in enumerate(some_lengths()):
        sent, target = runs_of(lengths, seed), runs_of(lengths, seed + 100)
        sums: list[int] = []

        def give(sent: Runs = sent, sums: list[int] = sums) -> None:
            sums.append(
                wire.send(client, HEAD, sent, has_checksum=True, timeout_s=WAIT_S, check=go_on)
            )

        thread = threading.Thread(target=give)
        thread.start()
        head = bytearray(len(HEAD))
        assert stream.receive(server, memoryview(head), timeout_s=WAIT_S)
        found = wire.receive(server, target, has_checksum=True, timeout_s=WAIT_S)
        thread.join()
        assert head == HEAD
        assert joined(target) == joined(sent)
        assert found == sums[0] == xxhash.xxh3_64_intdigest(joined(sent)), lengths


def num_unread(sock: socket.socket) -> int:
    count = array.array("i", [0])
    fcntl.ioctl(sock, termios.FIONREAD, count)
    return count[0]


def test_the_end_of_a_payload_is_not_waited_for_after_it_is_there(ends) -> None:
    client, server = ends
    # A receiver that sleeps on does so until the tick every time; a busy machine is late now and
    # then.
    assert min(seconds_after_the_end(client, server) for _ in range(4)) < stream.TICK_S / 2


def seconds_after_the_end(client: socket.socket, server: socket.socket) -> float:
    """From the last byte of a payload in two parts until its receiver has it."""
    target = runs_of([100_000], 1)
    client.sendall(bytes(60_000))
    thread = threading.Thread(
        target=wire.receive, args=(server, target), kwargs={"has_checksum": True, "timeout_s": 9}
    )
    thread.start()
    end_s = time.monotonic() + stream.TICK_S / 4
    while num_unread(server) and time.monotonic() < end_s:  # a receiver may take the first part
        pass
    client.sendall(bytes(40_000))
    sent_s = time.monotonic()
    thread.join()
    return time.monotonic() - sent_s


@pytest.mark.parametrize(
    ("offset", "length"), [(-1, 1000), (0, 0), (POOL_BYTES - 999, 1000), (POOL_BYTES, 1 << 62)]
)
def test_a_run_outside_of_its_pool_moves_nothing(ends, offset: int, length: int) -> None:
    client, server = ends
    runs = runs_of([1000, 1000], 1)
    runs.offsets[1], runs.lengths[1] = offset, length
    before = runs.pool.copy()
    with pytest.raises(IndexError):
        wire.receive(server, runs, has_checksum=True, timeout_s=WAIT_S)
    with pytest.raises(IndexError):
        wire.send(client, HEAD, runs, has_checksum=False, timeout_s=WAIT_S, check=go_on)
    client.close()
    assert server.recv(1) == b""
    assert (runs.pool == before).all()


def test_a_payload_too_short_for_its_checksum_is_refused(ends) -> None:
    _, server = ends
    with pytest.raises(IndexError):
        wire.receive(server, runs_of([100, 140], 1), has_checksum=True, timeout_s=WAIT_S)


def test_a_peer_that_closes_or_falls_silent_in_the_middle_is_named(ends) -> None:
    client, server = ends
    client.sendall(bytes(500))
    with pytest.raises(StalledError):
        wire.receive(server, runs_of([1000], 1), has_checksum=True, timeout_s=0.1)
    client.sendall(bytes(500))
    client.close()
    with pytest.raises(ConnectionResetError):
        wire.receive(server, runs_of([1000], 1), has_checksum=True, timeout_s=WAIT_S)


def test_a_send_that_nobody_takes_asks_and_ends(ends) -> None:
    client, server = ends
    pool = np.zeros(MORE_THAN_FITS, np.uint8)
    runs = Runs(pool, np.array([0]), np.array([len(pool)]))
    with pytest.raises(StalledError):
        wire.send(client, HEAD, runs, has_checksum=True, timeout_s=0.1, check=go_on)
    with pytest.raises(GivenUpError):
        wire.send(client, HEAD, runs, has_checksum=True, timeout_s=WAIT_S, check=give_up)
    server.close()
    with pytest.raises(OSError, match=r"reset|Broken pipe"):
        wire.send(client, HEAD, runs, has_checksum=True, timeout_s=WAIT_S, check=go_on)
