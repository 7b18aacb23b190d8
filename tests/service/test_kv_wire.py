"""Frames that the C library moves: the same bytes and checksums as without it."""

import array
import fcntl
import os
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
from kv_transfer.copying import Offsets
from kv_transfer.frame import checksum_to_bytes
from kv_transfer.runs import BlockRuns
from kv_transfer.stream import StalledError
from kv_transfer.wire import PoolBlocks, Wire, wire_of

WAIT_S = 10.0
NUM_BLOCKS, BLOCK_BYTES = 4, 4096
BLOCK_IDS = [2, 0, 1]
MORE_THAN_FITS = 64 << 20
HEAD = bytes(range(100))
ANSWER = bytes(range(40))

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


def blocks_of(lengths: list[int], block_ids: list[int], seed: int) -> PoolBlocks:
    """Runs of so many bytes, with gaps of all sizes, in blocks of a pool of noise."""
    dice = np.random.default_rng(seed)
    gaps = dice.integers(0, 100, len(lengths))
    offsets = np.cumsum(gaps) + np.cumsum([0, *lengths[:-1]])
    block_bytes = int(offsets[-1]) + lengths[-1] + 7
    pool = dice.integers(0, 256, block_bytes * NUM_BLOCKS, np.uint8)
    return PoolBlocks(
        pool, runs_from(offsets, np.array(lengths), block_bytes), np.array(block_ids, np.int64)
    )


def runs_from(offsets: Offsets, lengths: Offsets, block_bytes: int) -> BlockRuns:
    return BlockRuns(offsets, lengths, (offsets.ctypes.data, lengths.ctypes.data), block_bytes)


def joined(blocks: PoolBlocks) -> bytes:
    rows = blocks.pool.reshape(-1, blocks.runs.pool_block_bytes)
    return b"".join(
        rows[block_id, first : first + length].tobytes()
        for block_id in blocks.block_ids.tolist()
        for first, length in zip(
            blocks.runs.offsets.tolist(), blocks.runs.lengths.tolist(), strict=True
        )
    )


def sealed(payload: bytes) -> bytes:
    return payload + checksum_to_bytes(xxhash.xxh3_64_intdigest(payload))


def a_wire(sock: socket.socket, *, timeout_s: float = WAIT_S) -> Wire:
    found = wire_of(sock, timeout_s=timeout_s)
    assert found is not None
    return found


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
def test_blocks_arrive_between_their_head_and_the_checksum_that_xxhash_takes(ends) -> None:
    client, server = ends
    near, far = a_wire(client), a_wire(server)
    for seed, lengths in enumerate(some_lengths()):
        block_ids = [1] if len(lengths) == 1 else BLOCK_IDS  # then it is the payload's length
        sent = blocks_of(lengths, block_ids, seed)
        target = blocks_of(lengths, block_ids[::-1], seed)
        whole = joined(sent)
        answer = bytearray(len(ANSWER))
        thread = threading.Thread(
            target=near.send,
            args=(HEAD, sent),
            kwargs={"has_checksum": True, "answer": answer, "check": go_on},
        )
        thread.start()
        head = bytearray(len(HEAD))
        assert stream.receive(server, memoryview(head), timeout_s=WAIT_S)
        if seed % 2:
            assert far.receive(target, has_checksum=True), lengths
            assert joined(target) == whole
        else:
            data = bytearray(len(sealed(whole)))
            assert stream.receive(server, memoryview(data), timeout_s=WAIT_S)
            assert data == sealed(whole), lengths
        server.sendall(ANSWER)
        thread.join()
        assert head == HEAD
        assert answer == ANSWER


@pytest.mark.usefixtures("level")
def test_each_bit_of_a_payload_and_of_its_checksum_counts(ends) -> None:
    client, server = ends
    far = a_wire(server)
    target = blocks_of([300], [0], 1)
    data = sealed(os.urandom(300))
    for bit in range(0, 8 * len(data), 7):
        client.sendall(with_bit_flipped(data, bit))
        assert not far.receive(target, has_checksum=True)
    client.sendall(data)
    assert far.receive(target, has_checksum=True)


def with_bit_flipped(data: bytes, bit: int) -> bytearray:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return flipped


def test_a_payload_without_a_checksum_may_be_short(ends) -> None:
    client, server = ends
    sent, target = blocks_of([5], [1], 1), blocks_of([5], [2], 2)
    a_wire(client).send(HEAD, sent, has_checksum=False, answer=bytearray(), check=go_on)
    assert stream.receive(server, memoryview(bytearray(len(HEAD))), timeout_s=WAIT_S)
    assert a_wire(server).receive(target, has_checksum=False)
    assert joined(target) == joined(sent)


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
    target = blocks_of([100_000], [0], 1)
    data = sealed(bytes(100_000))
    client.sendall(data[:60_000])
    thread = threading.Thread(
        target=a_wire(server).receive, args=(target,), kwargs={"has_checksum": True}
    )
    thread.start()
    end_s = time.monotonic() + stream.TICK_S / 4
    while num_unread(server) and time.monotonic() < end_s:  # a receiver may take the first part
        pass
    client.sendall(data[60_000:])
    sent_s = time.monotonic()
    thread.join()
    return time.monotonic() - sent_s


@pytest.mark.parametrize(
    ("offset", "length", "block_id"),
    [
        (-1, 1000, 0),
        (0, 0, 0),
        (BLOCK_BYTES - 999, 1000, 0),
        (BLOCK_BYTES, 1 << 62, 0),
        (0, 1000, -1),
        (0, 1000, NUM_BLOCKS),
        (0, 1000, 1 << 62),
    ],
)
def test_a_run_outside_of_its_pool_moves_nothing(
    ends, offset: int, length: int, block_id: int
) -> None:
    client, server = ends
    runs = runs_from(np.array([0, offset]), np.array([1000, length]), BLOCK_BYTES)
    pool = np.random.default_rng(1).integers(0, 256, NUM_BLOCKS * BLOCK_BYTES, np.uint8)
    blocks = PoolBlocks(pool, runs, np.array([1, block_id]))
    before = pool.copy()
    with pytest.raises(IndexError):
        a_wire(server).receive(blocks, has_checksum=True)
    with pytest.raises(IndexError):
        a_wire(client).send(HEAD, blocks, has_checksum=False, answer=bytearray(), check=go_on)
    client.close()
    assert server.recv(1) == b""
    assert (pool == before).all()


def test_a_payload_too_short_for_its_checksum_is_refused(ends) -> None:
    _, server = ends
    with pytest.raises(IndexError):
        a_wire(server).receive(blocks_of([100, 140], [3], 1), has_checksum=True)


def test_a_peer_that_closes_or_falls_silent_in_the_middle_is_named(ends) -> None:
    client, server = ends
    target = blocks_of([1000], [0], 1)
    client.sendall(bytes(1007))
    with pytest.raises(StalledError):
        a_wire(server, timeout_s=0.1).receive(target, has_checksum=True)
    client.sendall(bytes(1007))
    client.close()
    with pytest.raises(ConnectionResetError):
        a_wire(server).receive(target, has_checksum=True)


def test_a_send_that_nobody_takes_or_answers_asks_and_ends(ends) -> None:
    client, server = ends
    large = blocks_of([MORE_THAN_FITS // NUM_BLOCKS], BLOCK_IDS, 1)
    small = blocks_of([1000], [0], 1)
    patient, hasty = a_wire(client), a_wire(client, timeout_s=0.1)
    for blocks in (small, large):
        with pytest.raises(StalledError):
            hasty.send(HEAD, blocks, has_checksum=True, answer=bytearray(9), check=go_on)
        with pytest.raises(GivenUpError):
            patient.send(HEAD, blocks, has_checksum=True, answer=bytearray(9), check=give_up)
    server.close()
    with pytest.raises(OSError, match=r"reset|Broken pipe|closed"):
        patient.send(HEAD, small, has_checksum=True, answer=bytearray(9), check=go_on)
