"""The data port believes nothing: every frame is checked against its lease before its payload."""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import xxhash

from engine.errors import (
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
)
from engine.parallel.layout import MAX_RANKS
from kv_transfer import frame, wire
from kv_transfer.blocks import host_blocks, source_from
from kv_transfer.config import TransferConfig
from kv_transfer.frame import (
    FrameHeader,
    PushAnswer,
    PushStatus,
    answer_from,
    checksum_to_bytes,
    ids_to_bytes,
)
from kv_transfer.frame_writer import FrameWriter
from kv_transfer.local_sending_rank import choose_writer
from kv_transfer.offer import RankOffer, TcpOffer
from kv_transfer.plane import WritePermit, WriteStoppedError, WriteWindow
from kv_transfer.reshard import Box
from kv_transfer.sending_rank import Target
from kv_transfer.slot_ranges import SlotRange
from kv_transfer.tcp_intake import TcpIntake
from kv_transfer.tcp_writer import tcp_writer
from kv_transfer.tls import client_context, server_context
from tests.fakes.clock import FakeClock
from tests.fakes.descriptors import open_things
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, WHOLE_BOX, HostMemory
from tests.fakes.tls import SECURED, UNKNOWN

EPOCH = 77
LEASE_ID = 5
TOKEN_BYTES = TINY_LAYOUT.bytes_per_token
BLOCK_BYTES = TINY_LAYOUT.block_bytes
WAIT_S = 10.0


@dataclass(frozen=True)
class Frame:
    """A header as no sender of ours may have made it, and the block ids behind it."""

    header: FrameHeader
    block_ids: tuple[int, ...]

    def but(self, *, block_ids: tuple[int, ...] | None = None, **changes: Any) -> "Frame":
        block_ids = self.block_ids if block_ids is None else block_ids
        changes = {"num_blocks": len(block_ids)} | changes
        return Frame(self.header._replace(**changes), block_ids)

    def to_bytes(self) -> bytes:
        ids = ids_to_bytes(np.array(self.block_ids, np.int64))
        checksum = xxhash.xxh3_64_intdigest(ids)
        return self.header._replace(ids_checksum=checksum).to_bytes() + ids


GOOD_HEADER = FrameHeader(
    is_last=True,
    has_checksum=False,
    writer_id=1,
    push=1,
    lease_id=LEASE_ID,
    epoch=EPOCH,
    num_blocks=1,
    first_slot=0,
    num_slots=4,
    box=WHOLE_BOX,
    num_bytes=BLOCK_BYTES,
    ids_checksum=0,
)
GOOD = Frame(GOOD_HEADER, (9,))
PREFIX_BYTES = len(GOOD.to_bytes())


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait for another thread's doing, at most WAIT_S."""
    end_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end_s, "it never came true"
        time.sleep(0.002)


@contextmanager
def an_intake(
    memory: HostMemory, *, timeout_s: float = 1.0, max_connections: int = 4
) -> Iterator[TcpIntake]:
    """Lends tokens [2, 11) of blocks 3, 9, 1 under LEASE_ID."""
    config = TransferConfig(data_timeout_s=timeout_s, max_data_connections=max_connections)
    intake = TcpIntake(memory, epoch=EPOCH, config=config)
    intake.open(WriteWindow(LEASE_ID, (3, 9, 1), 2, 11))
    try:
        yield intake
    finally:
        intake.close()


@contextmanager
def connected(intake: TcpIntake) -> Iterator[socket.socket]:
    with socket.create_connection((intake.offer.host, intake.offer.port), timeout=WAIT_S) as sock:
        yield sock


def answer_on(sock: socket.socket) -> PushStatus:
    data = b""
    while len(data) < frame.ANSWER_BYTES:
        piece = sock.recv(frame.ANSWER_BYTES - len(data))
        assert piece, "closed without an answer"
        data += piece
    return answer_from(data).status


def is_closed(sock: socket.socket) -> bool:
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def a_writer(intake: TcpIntake, *, has_checksums: bool = True) -> FrameWriter:
    address = (intake.offer.host, intake.offer.port)
    return tcp_writer(address, timeout_s=1.0, has_checksums=has_checksums)


def a_permit(lease_id: int = LEASE_ID, epoch: int = EPOCH) -> WritePermit:
    return WritePermit(lease_id, epoch, FakeClock(), 1e9)


def written(writer: FrameWriter, local: HostMemory, parts: list[SlotRange], permit=None) -> int:
    source = source_from(local, host_blocks(local), parts)
    return writer.write(permit or a_permit(), source, parts, WHOLE)


def test_a_good_frame_is_written_and_answered() -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        payload = os.urandom(BLOCK_BYTES)
        sock.sendall(GOOD.to_bytes() + payload)
        assert answer_on(sock) is PushStatus.WRITTEN
        assert memory.rows()[9].tobytes() == payload


@pytest.mark.parametrize(
    ("changes", "reason", "status"),
    [
        ({"lease_id": 6}, "unknown_lease", PushStatus.LEASE_LOST),
        ({"epoch": 78}, "stale_epoch", PushStatus.LEASE_LOST),
        ({"block_ids": (2,)}, "foreign_block", PushStatus.REFUSED),
        ({"block_ids": (1 << 31,)}, "foreign_block", PushStatus.REFUSED),
        ({"num_slots": 0, "num_bytes": 0}, "bad_slots", PushStatus.REFUSED),
        ({"num_slots": 5, "num_bytes": 5 * TOKEN_BYTES}, "bad_slots", PushStatus.REFUSED),
        (
            {"num_slots": 0xFFFFFFFF, "num_bytes": 0xFFFFFFFF},
            "bad_slots",
            PushStatus.REFUSED,
        ),
        ({"box": Box(1, 3, 0, 2)}, "bad_box", PushStatus.REFUSED),
        ({"box": Box(0, 3, 1, 2)}, "bad_box", PushStatus.REFUSED),
        ({"box": Box(0, 0, 0, 2), "num_bytes": 0}, "bad_box", PushStatus.REFUSED),
        ({"box": Box(0, 3, 0, 0), "num_bytes": 0}, "bad_box", PushStatus.REFUSED),
        ({"box": Box(0, 0xFFFFFFFF, 0, 2)}, "bad_box", PushStatus.REFUSED),
        ({"box": Box(0, 2, 0, 2)}, "bad_length", PushStatus.REFUSED),
        ({"num_bytes": BLOCK_BYTES - 1}, "bad_length", PushStatus.REFUSED),
        ({"num_bytes": 0xFFFFFFFF}, "bad_length", PushStatus.REFUSED),
        ({"block_ids": (9, 2), "num_bytes": 2 * BLOCK_BYTES}, "foreign_block", PushStatus.REFUSED),
        ({"num_blocks": 0, "num_bytes": 0}, "bad_length", PushStatus.REFUSED),
        (
            {"num_blocks": 1025, "num_bytes": 1025 * BLOCK_BYTES},
            "bad_length",
            PushStatus.REFUSED,
        ),
        ({"first_slot": 1}, "foreign_slots", PushStatus.REFUSED),
        ({"first_slot": 0xFFFFFFFF}, "foreign_slots", PushStatus.REFUSED),
        ({"block_ids": (3,)}, "foreign_slots", PushStatus.REFUSED),  # the cached prefix
        ({"block_ids": (1,)}, "foreign_slots", PushStatus.REFUSED),  # beyond the last token
    ],
)
def test_a_frame_outside_its_lease_closes_the_connection(changes, reason, status) -> None:
    with HostMemory().fill_randomly(1) as memory, an_intake(memory) as intake:
        before = memory.rows().copy()
        with connected(intake) as sock:
            sock.sendall(GOOD.but(**changes).to_bytes())
            assert answer_on(sock) is status
            assert is_closed(sock)
        assert intake.dropped == {reason: 1}
        np.testing.assert_array_equal(memory.rows(), before)
        with connected(intake) as sock:  # and the next one is served
            sock.sendall(GOOD.to_bytes() + bytes(BLOCK_BYTES))
            assert answer_on(sock) is PushStatus.WRITTEN


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (
            b"GET / HTTP/1.1\r\nHost: localhost\r\n"
            b"User-Agent: curl/8.10.1\r\nAccept: */*\r\n\r\n" + bytes(80),
            "bad_magic",
        ),
        (b"\x16\x03\x01" + bytes(200), "bad_magic"),
        (b"ISKV\x01" + bytes(200), "bad_version"),
        (b"ISKV\x03\xff" + bytes(200), "damaged"),
    ],
    ids=["http", "tls", "version", "flags"],
)
def test_garbage_is_counted_and_cut_off(data: bytes, reason: str) -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        sock.sendall(data)
        assert is_closed(sock)
        assert intake.dropped == {reason: 1}
        assert not memory.rows().any()


@pytest.mark.parametrize("num_sent", [0, 10, PREFIX_BYTES - 2, PREFIX_BYTES, PREFIX_BYTES + 10])
def test_a_stranger_that_falls_silent_is_cut_off(num_sent: int) -> None:
    with HostMemory() as memory, an_intake(memory, timeout_s=0.1) as intake:
        with connected(intake) as sock:
            sock.sendall((GOOD.to_bytes() + bytes(BLOCK_BYTES))[:num_sent])
            assert is_closed(sock)
        assert intake.dropped == {"stalled": 1}
        assert intake.fence(LEASE_ID, is_forced=False)


def test_a_sender_that_is_known_may_be_idle() -> None:
    with (
        HostMemory() as memory,
        an_intake(memory, timeout_s=0.1) as intake,
        connected(intake) as sock,
    ):
        data = GOOD.to_bytes() + bytes(BLOCK_BYTES)
        sock.sendall(data)
        assert answer_on(sock) is PushStatus.WRITTEN
        sock.settimeout(0.6)
        with pytest.raises(TimeoutError):
            sock.recv(1)
        sock.settimeout(WAIT_S)
        sock.sendall(data)
        assert answer_on(sock) is PushStatus.WRITTEN


@pytest.mark.parametrize("num_sent", [10, PREFIX_BYTES - 2, PREFIX_BYTES, PREFIX_BYTES + 10])
def test_a_truncated_frame_leaves_no_writer_behind(num_sent: int) -> None:
    with HostMemory() as memory, an_intake(memory) as intake:
        with connected(intake) as sock:
            sock.sendall((GOOD.to_bytes() + bytes(BLOCK_BYTES))[:num_sent])
        eventually(lambda: intake.dropped["broken"] == 1)
        assert intake.fence(LEASE_ID, is_forced=False)


def test_the_fence_waits_for_a_frame_under_way_and_cuts_it_off_when_forced() -> None:
    with (
        HostMemory() as memory,
        an_intake(memory, timeout_s=60) as intake,
        connected(intake) as sock,
    ):
        sock.sendall(GOOD.to_bytes() + b"x" * 10)
        eventually(lambda: LEASE_ID in intake.gate._busy)
        assert not intake.fence(LEASE_ID, is_forced=False)
        assert not intake.fence(LEASE_ID, is_forced=False)
        intake.fence(LEASE_ID, is_forced=True)
        eventually(lambda: intake.fence(LEASE_ID, is_forced=False))
        assert is_closed(sock)


def test_frames_of_a_lease_that_was_taken_back_go_nowhere() -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        assert intake.fence(LEASE_ID, is_forced=False)
        intake.open(WriteWindow(8, (4,), 0, 4))
        sock.sendall(GOOD.to_bytes() + b"x" * BLOCK_BYTES)
        assert answer_on(sock) is PushStatus.LEASE_LOST
        assert not memory.rows().any()
        other = GOOD.but(lease_id=8, block_ids=(4,))  # the connection goes on
        sock.sendall(other.to_bytes() + b"x" * BLOCK_BYTES)
        assert answer_on(sock) is PushStatus.WRITTEN


@pytest.fixture(params=["library", "no library"])
def library(request, monkeypatch) -> None:
    """What moves the payload."""
    if request.param == "no library":
        monkeypatch.setattr(wire, "_native", None)


@pytest.mark.usefixtures("library")
def test_a_damaged_payload_is_found() -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        payload = bytearray(os.urandom(BLOCK_BYTES))
        checksum = checksum_to_bytes(xxhash.xxh3_64_intdigest(payload))
        frame = GOOD.but(has_checksum=True)
        payload[100] ^= 1
        sock.sendall(frame.to_bytes() + payload + checksum)
        assert answer_on(sock) is PushStatus.CORRUPT
        payload[100] ^= 1
        sock.sendall(frame.to_bytes() + payload + checksum)
        assert answer_on(sock) is PushStatus.WRITTEN


@pytest.mark.usefixtures("library")
def test_one_damaged_frame_spoils_the_whole_push() -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        bad = GOOD.but(is_last=False, has_checksum=True)
        sock.sendall(bad.to_bytes() + bytes(BLOCK_BYTES) + checksum_to_bytes(1))
        sock.sendall(GOOD.to_bytes() + bytes(BLOCK_BYTES))
        assert answer_on(sock) is PushStatus.CORRUPT


def test_a_large_payload_is_checked_in_pieces(monkeypatch) -> None:
    monkeypatch.setattr(wire, "_native", None)
    for module in ("tcp_intake", "sending_connection"):
        monkeypatch.setattr(f"kv_transfer.{module}.PIECE_BYTES", 1000)
    parts = [SlotRange(0, 2, 3, 2, 2), SlotRange(1, 0, 9, 0, 4)]
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        an_intake(memory) as intake,
    ):
        writer = a_writer(intake)
        assert written(writer, local, parts) == 6 * TOKEN_BYTES
        writer.close()
        np.testing.assert_array_equal(memory.rows()[9], local.rows()[1])
        np.testing.assert_array_equal(memory.tokens([3], 2, 4), local.tokens([0], 2, 4))


def test_a_push_that_was_begun_again_shuts_the_earlier_one_out() -> None:
    good, late = os.urandom(BLOCK_BYTES), bytes(BLOCK_BYTES)
    with (
        HostMemory() as memory,
        an_intake(memory, timeout_s=60) as intake,
        connected(intake) as first,
        connected(intake) as second,
        connected(intake) as third,
    ):
        first.sendall(GOOD.to_bytes() + late[:-1])
        eventually(lambda: LEASE_ID in intake.gate._busy)
        second.sendall(GOOD.but(push=2).to_bytes() + good)
        assert answer_on(second) is PushStatus.WRITTEN
        assert is_closed(first)
        third.sendall(GOOD.to_bytes() + late)  # what was stuck somewhere and comes now
        assert answer_on(third) is PushStatus.LEASE_LOST
        assert memory.rows()[9].tobytes() == good
        third.sendall(GOOD.but(writer_id=2).to_bytes() + good)  # another rank of the sender
        assert answer_on(third) is PushStatus.WRITTEN


def test_a_lease_has_as_many_writers_as_a_worker_has_ranks() -> None:
    with HostMemory() as memory, an_intake(memory) as intake, connected(intake) as sock:
        for writer_id in range(MAX_RANKS):
            sock.sendall(GOOD.but(writer_id=writer_id).to_bytes() + bytes(BLOCK_BYTES))
            assert answer_on(sock) is PushStatus.WRITTEN
        sock.sendall(GOOD.but(writer_id=MAX_RANKS).to_bytes())
        assert answer_on(sock) is PushStatus.REFUSED
        eventually(lambda: intake.dropped == {"too_many_writers": 1})


def test_too_many_connections_are_refused() -> None:
    with HostMemory() as memory, an_intake(memory, max_connections=1) as intake:
        with connected(intake) as first:
            first.sendall(GOOD.to_bytes() + bytes(BLOCK_BYTES))
            assert answer_on(first) is PushStatus.WRITTEN
            with connected(intake) as second:
                assert is_closed(second)
        eventually(lambda: intake.dropped["too_many"] == 1)


def test_the_writer_names_what_the_receiver_answered() -> None:
    whole = [SlotRange(0, 0, 9, 0, 4)]
    with HostMemory() as memory, HostMemory() as local, an_intake(memory) as intake:
        writer = a_writer(intake)
        assert written(writer, local, whole) == BLOCK_BYTES
        with pytest.raises(KvLeaseLostError, match="LEASE_LOST"):
            written(writer, local, whole, a_permit(lease_id=6))
        with pytest.raises(KvLeaseLostError, match="LEASE_LOST"):
            written(writer, local, whole, a_permit(epoch=6))
        with pytest.raises(LayoutMismatchError, match="REFUSED"):
            written(writer, local, [SlotRange(0, 0, 8, 0, 4)])
        assert written(writer, local, [SlotRange(0, 1, 9, 1, 2)]) == 2 * TOKEN_BYTES
        writer.close()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("place", [0, 300, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 7])
def test_damage_on_the_way_is_named(place: int) -> None:
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        an_intake(memory) as intake,
        Relay(intake.offer.port, damaged_byte=PREFIX_BYTES + place) as relay,
    ):
        writer = tcp_writer(("127.0.0.1", relay.port), timeout_s=1.0, has_checksums=True)
        with pytest.raises(KvCorruptionError):
            written(writer, local, [SlotRange(0, 0, 9, 0, 4)])
        writer.close()


def test_the_writer_connects_again_when_its_connection_has_gone() -> None:
    whole = [SlotRange(0, 0, 9, 0, 4)]
    with HostMemory() as memory, HostMemory().fill_randomly(1) as local:
        with an_intake(memory) as intake:
            writer = a_writer(intake)
            written(writer, local, whole)
            assert writer._connections[0]._socket is not None
            writer._connections[0]._socket.shutdown(socket.SHUT_RDWR)
            with pytest.raises(PeerUnavailableError, match="data port"):
                written(writer, local, whole)
            assert written(writer, local, whole) == BLOCK_BYTES
        with pytest.raises(PeerUnavailableError, match="data port"):
            written(writer, local, whole)
        writer.close()
        np.testing.assert_array_equal(memory.rows()[9], local.rows()[0])


@pytest.mark.parametrize(
    "reply",
    [b"", b"x" * 100, PushAnswer(PushStatus.WRITTEN, 2, LEASE_ID).to_bytes(), None],
    ids=["closes", "garbage", "another push", "silence"],
)
def test_a_receiver_that_is_none_is_unavailable(reply: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, HostMemory() as local:

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1 << 20)
                if reply is not None:
                    sock.sendall(reply)
                    return
                while sock.recv(1 << 20):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        writer = tcp_writer(listener.getsockname(), timeout_s=0.5, has_checksums=True)
        with pytest.raises(PeerUnavailableError):
            written(writer, local, [SlotRange(0, 0, 9, 0, 4)])
        writer.close()
        thread.join(WAIT_S)


@pytest.mark.parametrize("files", [{}, SECURED], ids=["plain", "tls"])
def test_a_write_that_is_stuck_ends_when_it_is_stopped(files: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, HostMemory() as local:
        tls = client_context(secured(**files))
        writer = tcp_writer(listener.getsockname(), timeout_s=60, has_checksums=True, tls=tls)
        permit = a_permit()
        outcome: list[BaseException] = []

        def write() -> None:
            try:
                written(writer, local, [SlotRange(0, 0, 9, 0, 4)], permit)
            except WriteStoppedError as error:
                outcome.append(error)

        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        sock, _ = listener.accept()
        if (context := server_context(secured(**files))) is not None:
            sock = context.wrap_socket(sock, server_side=True)
        with sock:
            assert sock.recv(1)
            permit.stopped.set()
            thread.join(WAIT_S)
        assert not thread.is_alive()
        assert len(outcome) == 1
        writer.close()


def test_a_port_that_gets_no_thread_serves_the_next_connection(monkeypatch) -> None:
    start = threading.Thread.start
    failures = [RuntimeError("can't start new thread")]

    def start_later(thread: threading.Thread) -> None:
        if thread.name == "kv-receive" and failures:
            raise failures.pop()
        start(thread)

    with HostMemory() as memory, an_intake(memory) as intake:
        monkeypatch.setattr(threading.Thread, "start", start_later)
        with connected(intake) as sock:
            assert is_closed(sock)
        eventually(lambda: intake.dropped == {"no_thread": 1})
        with connected(intake) as sock:
            sock.sendall(GOOD.to_bytes() + bytes(BLOCK_BYTES))
            assert answer_on(sock) is PushStatus.WRITTEN


def test_closing_leaves_no_thread_and_no_descriptor() -> None:
    with HostMemory() as memory:
        before = open_things()
        with an_intake(memory) as intake, connected(intake) as idle, connected(intake) as busy:
            busy.sendall(GOOD.to_bytes() + b"x" * 10)
            idle.sendall(GOOD.to_bytes() + bytes(BLOCK_BYTES))
            assert answer_on(idle) is PushStatus.WRITTEN
            assert open_things() - before
        assert open_things() <= before


# TLS, and several connections.


def secured(**files: Any) -> TransferConfig:
    return TransferConfig(data_timeout_s=1.0, **files)


@contextmanager
def a_secured_intake(memory: HostMemory, *, timeout_s: float = 1.0) -> Iterator[TcpIntake]:
    config = replace(secured(**SECURED), data_timeout_s=timeout_s)
    intake = TcpIntake(memory, epoch=EPOCH, config=config)
    intake.open(WriteWindow(LEASE_ID, (3, 9, 1), 2, 11))
    try:
        yield intake
    finally:
        intake.close()


def a_secured_writer(intake: TcpIntake, **files: str) -> FrameWriter:
    return tcp_writer(
        (intake.offer.host, intake.offer.port),
        timeout_s=1.0,
        has_checksums=True,
        tls=client_context(secured(**files)) if files else None,
    )


def test_what_crosses_with_tls_cannot_be_read_on_the_way() -> None:
    whole = [SlotRange(0, 0, 9, 0, 4)]
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        a_secured_intake(memory) as intake,
        Relay(intake.offer.port) as relay,
    ):
        assert intake.offer.is_secured
        writer = tcp_writer(
            ("127.0.0.1", relay.port),
            timeout_s=5.0,
            has_checksums=True,
            tls=client_context(secured(**SECURED)),
        )
        assert written(writer, local, whole) == BLOCK_BYTES
        writer.close()
        np.testing.assert_array_equal(memory.rows()[9], local.rows()[0])
        assert len(relay.heard) > BLOCK_BYTES
        assert local.rows()[0].tobytes() not in relay.heard
        assert b"ISKV" not in relay.heard


@pytest.mark.parametrize("files", [{}, UNKNOWN], ids=["plain", "unknown authority"])
def test_a_sender_that_is_not_vouched_for_is_kept_out(files: dict[str, str]) -> None:
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        a_secured_intake(memory) as intake,
    ):
        writer = a_secured_writer(intake, **files)
        with pytest.raises(PeerUnavailableError):
            written(writer, local, [SlotRange(0, 0, 9, 0, 4)])
        writer.close()
        eventually(lambda: intake.dropped == {"tls": 1})
        assert not memory.rows().any()


def test_who_says_nothing_where_tls_is_spoken_is_cut_off() -> None:
    with (
        HostMemory() as memory,
        a_secured_intake(memory, timeout_s=0.1) as intake,
        connected(intake) as sock,
    ):
        assert is_closed(sock)
        eventually(lambda: intake.dropped == {"tls": 1})


@pytest.mark.parametrize("num_sent", [0, 10, PREFIX_BYTES + 10])
def test_a_sender_that_falls_silent_behind_tls_is_cut_off(num_sent: int) -> None:
    context = client_context(secured(**SECURED))
    assert context is not None
    with (
        HostMemory() as memory,
        a_secured_intake(memory, timeout_s=0.1) as intake,
        connected(intake) as plain,
        context.wrap_socket(plain) as sock,
    ):
        sock.sendall((GOOD.to_bytes() + bytes(BLOCK_BYTES))[:num_sent])
        eventually(lambda: intake.dropped == {"stalled": 1})
        assert intake.fence(LEASE_ID, is_forced=False)


def test_a_receiver_that_is_not_vouched_for_gets_nothing() -> None:
    with HostMemory() as memory, HostMemory().fill_randomly(1) as local:
        intake = TcpIntake(memory, epoch=EPOCH, config=secured(**UNKNOWN))
        try:
            writer = a_secured_writer(intake, **SECURED)
            with pytest.raises(PeerUnavailableError, match="certificate"):
                written(writer, local, [SlotRange(0, 0, 9, 0, 4)])
            writer.close()
        finally:
            intake.close()


def test_a_push_of_many_frames_takes_several_connections(monkeypatch) -> None:
    monkeypatch.setattr("kv_transfer.tcp_writer.FRAME_BYTES", BLOCK_BYTES)
    parts = [SlotRange(index, 0, block, 0, 4) for index, block in enumerate((4, 9, 2, 7, 5))]
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        an_intake(memory) as intake,
    ):
        intake.open(WriteWindow(6, (4, 9, 2, 7, 5), 0, 20))
        address = (intake.offer.host, intake.offer.port)
        writer = tcp_writer(address, timeout_s=1.0, has_checksums=True, num_connections=3)
        assert written(writer, local, parts, a_permit(6)) == 5 * BLOCK_BYTES
        assert len(intake._listener.connections) == 3
        np.testing.assert_array_equal(memory.rows()[[4, 9, 2, 7, 5]], local.rows()[:5])
        assert intake.fence(6, is_forced=False)
        with pytest.raises(KvLeaseLostError, match="LEASE_LOST"):
            written(writer, local, parts, a_permit(6))
        writer.close()
        eventually(lambda: not intake._listener.connections)


@pytest.mark.parametrize("is_secured", [False, True])
def test_ends_that_disagree_about_tls_are_told_so(is_secured: bool) -> None:
    offer = RankOffer(shm=None, tcp=TcpOffer("127.0.0.1", 1, is_secured=not is_secured))
    target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
    speaks, does_not = ("this end", "decode-0") if is_secured else ("decode-0", "this end")
    with pytest.raises(LayoutMismatchError, match=f"{speaks} speaks TLS .* but {does_not} does"):
        choose_writer(target, secured(**SECURED) if is_secured else TransferConfig(), None)


class Relay:
    """Stands between a writer and a port: remembers what the writer says, or damages it."""

    def __init__(self, port: int, *, damaged_byte: int | None = None) -> None:
        self._damaged_byte = damaged_byte
        self._target_port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard = bytearray()
        self._threads = [threading.Thread(target=self._relay)]

    def __enter__(self) -> "Relay":
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for thread in self._threads:
            thread.join(WAIT_S)
        self._listener.close()

    def _relay(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(("127.0.0.1", self._target_port))
        back = threading.Thread(target=self._pass_on, args=(far, near, bytearray()))
        self._threads.append(back)
        back.start()
        self._pass_on(near, far, self.heard)

    def _pass_on(self, source: socket.socket, target: socket.socket, heard: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(self._damaged(data, len(heard)))
                heard += data
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _damaged(self, data: bytes, first: int) -> bytes:
        """`first`: of the connection, in this direction."""
        place = -1 if self._damaged_byte is None else self._damaged_byte - first
        if not 0 <= place < len(data):
            return data
        return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
