"""The nixl plane: what it is chosen for, what it says when it is not there, what it lets in."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from engine.errors import LayoutMismatchError, PeerUnavailableError
from kv_transfer import nixl_agent, nixl_writer
from kv_transfer.blocks import host_blocks, source_from
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import choose_writer
from kv_transfer.nixl_agent import NixlAgent, is_installed
from kv_transfer.nixl_intake import NixlIntake
from kv_transfer.nixl_wire import MAX_METADATA_BYTES, addresses_to_bytes, greeting
from kv_transfer.offer import NixlOffer, RankOffer, TcpOffer
from kv_transfer.plane import WritePermit, WriteStoppedError, WriteWindow
from kv_transfer.sending_connection import Push
from kv_transfer.sending_rank import Target
from kv_transfer.slot_ranges import SlotRange
from tests.fakes.clock import FakeClock
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, DeviceMemory, HostMemory
from tests.fakes.kv_pair import kv_pair

needs_nixl = pytest.mark.skipif(not is_installed(), reason="NIXL is not installed")
WAIT_S = 10.0
NIXL = TransferConfig(data_plane=DataPlane.NIXL, data_timeout_s=1.0)


def without_nixl(monkeypatch) -> None:
    monkeypatch.setattr(nixl_agent, "_PACKAGES", ("nixl_that_nobody_has",))


async def test_a_receiver_that_shall_use_it_and_has_it_not_says_what_to_install(
    monkeypatch,
) -> None:
    without_nixl(monkeypatch)
    with HostMemory() as memory, pytest.raises(PeerUnavailableError, match=r"isthmus\[nixl\]"):
        await LocalReceivingRank(memory, NIXL).start(epoch=1)


def test_a_sender_that_shall_use_it_and_has_it_not_says_what_to_install(monkeypatch) -> None:
    without_nixl(monkeypatch)
    offer = RankOffer(shm=None, tcp=None, nixl=NixlOffer("127.0.0.1", 1))
    target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
    with HostMemory() as memory, pytest.raises(PeerUnavailableError, match=r"isthmus\[nixl\]"):
        choose_writer(target, NIXL, host_blocks(memory))


def test_a_sender_that_cannot_use_it_takes_tcp_and_says_so(monkeypatch) -> None:
    without_nixl(monkeypatch)
    offer = RankOffer(None, TcpOffer("127.0.0.1", 1), NixlOffer("127.0.0.1", 2))
    target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
    with HostMemory() as memory:
        choice = choose_writer(target, TransferConfig(), host_blocks(memory))
    assert (choice.writer.name, choice.fallback_reason) == ("tcp", "no_nixl")


async def test_a_receiver_that_does_not_offer_it_is_named() -> None:
    offer = RankOffer(None, TcpOffer("127.0.0.1", 1))
    target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
    with pytest.raises(LayoutMismatchError, match="data_plane is nixl here but decode-0 offers"):
        choose_writer(target, NIXL, None)


async def test_it_is_not_offered_of_itself_where_no_card_needs_it(monkeypatch) -> None:
    monkeypatch.setattr(nixl_agent, "has_rdma", lambda: False)
    with HostMemory() as memory:
        rank = LocalReceivingRank(memory, TransferConfig())
        offer = await rank.start(epoch=1)
        await rank.stop()
    assert (offer.nixl, offer.shm is None, offer.tcp is None) == (None, False, False)


async def test_a_card_that_it_cannot_use_leaves_the_others(monkeypatch, caplog) -> None:
    monkeypatch.setattr(nixl_agent, "has_rdma", lambda: True)
    monkeypatch.setattr(nixl_agent, "is_installed", lambda: True)
    without_nixl(monkeypatch)
    with HostMemory() as memory:
        rank = LocalReceivingRank(memory, TransferConfig())
        offer = await rank.start(epoch=1)
        await rank.stop()
    assert (offer.nixl, offer.tcp is None) == (None, False)
    assert "nixl is not offered" in caplog.text


@needs_nixl
async def test_it_is_chosen_between_hosts_with_a_card_for_it(monkeypatch) -> None:
    monkeypatch.setattr(nixl_agent, "has_rdma", lambda: True)
    async with kv_pair("auto") as pair:
        (offer,) = pair.receiver._offers
        pair.receiver._offers = (replace(offer, shm=None),)
        async with pair.sender.handover(
            "r", decode_address=pair.address, num_tokens=13
        ) as handover:
            await handover.push([0, 1, 2, 3], 0, 13)
            await handover.commit(7)
        assert handover.report.data_plane == "nixl"


@needs_nixl
async def test_a_pool_that_it_cannot_read_is_named() -> None:
    with DeviceMemory() as memory, pytest.raises(PeerUnavailableError, match="not host memory"):
        await LocalReceivingRank(memory, NIXL).start(epoch=1)


@contextmanager
def an_intake(memory: HostMemory) -> Iterator[NixlIntake]:
    intake = NixlIntake(memory, epoch=7, config=NIXL, address="127.0.0.1:0")
    intake.open(WriteWindow(5, (3, 9, 1), 0, 11))
    try:
        yield intake
    finally:
        intake.close()


@needs_nixl
@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"GET / HTTP/1.1\r\n\r\n" + bytes(80), "bad_magic"),
        (struct.pack(">4sIQ", b"ISKN", MAX_METADATA_BYTES + 1, 0), "bad_length"),
        (struct.pack(">4sIQ", b"ISKN", 4, 0) + b"meta", "damaged"),
        (greeting(b"not what NIXL would say"), "bad_metadata"),
    ],
    ids=["http", "too long", "damaged", "no metadata"],
)
def test_a_stranger_is_cut_off(sent: bytes, reason: str) -> None:
    with HostMemory() as memory, an_intake(memory) as intake:
        address = (intake.offer.host, intake.offer.port)
        with socket.create_connection(address, timeout=10) as sock:
            sock.sendall(sent)
            with contextlib.suppress(ConnectionResetError):
                assert sock.recv(1) == b""
        assert intake.dropped == {reason: 1}


@needs_nixl
def test_addresses_outside_the_senders_pool_are_not_read(monkeypatch) -> None:
    with (
        HostMemory() as memory,
        HostMemory().fill_randomly(1) as local,
        an_intake(memory) as intake,
    ):
        host = host_blocks(local)
        offer = RankOffer(None, None, intake.offer)
        target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
        writer = choose_writer(target, NIXL, host).writer
        monkeypatch.setattr(
            "kv_transfer.nixl_writer.addresses_to_bytes",
            lambda addresses: addresses_to_bytes(addresses - np.uint64(1 << 20)),
        )
        parts = [SlotRange(0, 0, 3, 0, 4)]
        with pytest.raises(PeerUnavailableError):
            writer.write(
                WritePermit(5, 7, FakeClock(), 1e9), source_from(local, host, parts), parts, WHOLE
            )
        writer.close()
        assert not memory.rows().any()


# A read that is under way: it cannot be called back, so nothing may forget that there is one.


class SlowNixl:
    """Does of NIXL's agent what a read asks of it."""

    def __init__(self, *states: str | Exception, num_refusals: int = 0) -> None:
        """The last of `states` stays."""
        self.num_released = 0
        self._states = list(states)
        self._num_refusals = num_refusals

    def get_xfer_descs(self, rows: object, kind: str) -> None: ...

    def initialize_xfer(self, *request: object) -> str:
        return "transfer"

    def transfer(self, transfer: str) -> str:
        return "PROC"

    def check_xfer_state(self, transfer: str) -> str:
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        if isinstance(state, Exception):
            raise state
        return state

    def release_xfer_handle(self, transfer: str) -> None:
        if self._num_refusals:
            self._num_refusals -= 1
            raise RuntimeError("NIXL_ERR_REPOST_ACTIVE")
        self.num_released += 1


@contextmanager
def an_agent(monkeypatch, slow: SlowNixl) -> Iterator[NixlAgent]:
    monkeypatch.setattr(nixl_agent, "RETRY_S", 0.001)
    with HostMemory() as memory:
        host = host_blocks(memory)
        assert host is not None
        agent = NixlAgent(host.flat)
        real, agent._agent = agent._agent, slow
        yield agent
        agent._agent = real
        agent.close()


def read_by(agent: NixlAgent) -> None:
    one = np.array([1], np.int64)
    agent.read("peer", agent.addresses(one), one, one)


@needs_nixl
@pytest.mark.parametrize(
    "states", [("PROC", RuntimeError("NIXL_ERR_REMOTE_DISCONNECT")), ("ERR",)], ids=["says", "is"]
)
def test_a_read_that_fails_is_released(monkeypatch, states: tuple[Any, ...]) -> None:
    with an_agent(monkeypatch, slow := SlowNixl(*states)) as agent:
        with pytest.raises(PeerUnavailableError):
            read_by(agent)
        assert slow.num_released == 1


@needs_nixl
def test_a_read_that_nixl_does_not_let_go_of_is_not_over(monkeypatch) -> None:
    failed = RuntimeError("NIXL_ERR_BACKEND")
    with an_agent(monkeypatch, slow := SlowNixl(failed, num_refusals=3)) as agent:
        with pytest.raises(PeerUnavailableError):
            read_by(agent)
        assert slow.num_released == 1


def in_a_thread(call: Callable[[], object]) -> threading.Thread:
    def run() -> None:
        with contextlib.suppress(PeerUnavailableError, WriteStoppedError):
            call()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


@needs_nixl
def test_a_read_that_is_stuck_keeps_its_blocks_and_ends_with_the_intake(monkeypatch) -> None:
    parts = [SlotRange(0, 0, 3, 0, 4)]
    with HostMemory() as memory, HostMemory().fill_randomly(1) as local:
        intake = NixlIntake(memory, epoch=7, config=NIXL, address="127.0.0.1:0")
        intake.open(WriteWindow(5, (3, 9, 1), 0, 11))
        has_begun = threading.Event()

        def stuck(transfer: object) -> str:
            has_begun.set()
            return "PROC"

        monkeypatch.setattr(intake.agent._agent, "transfer", stuck)
        monkeypatch.setattr(intake.agent._agent, "check_xfer_state", stuck)
        host = host_blocks(local)
        offer = RankOffer(None, None, intake.offer)
        target = Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
        writer = choose_writer(target, NIXL, host).writer
        permit = WritePermit(5, 7, FakeClock(), 1e9)
        source = source_from(local, host, parts)
        writing = in_a_thread(lambda: writer.write(permit, source, parts, WHOLE))
        assert has_begun.wait(WAIT_S)
        assert not intake.fence(5, is_forced=True)
        permit.stopped.set()
        writing.join(WAIT_S)
        assert not writing.is_alive()
        assert not intake.fence(5, is_forced=True)  # NIXL may still write there
        closing = in_a_thread(intake.close)
        closing.join(WAIT_S)
        assert not closing.is_alive()
        writer.close()


class Serving(NixlAgent):
    """The receiver's read needs `num_needed` rounds of it."""

    def __init__(self, num_needed: int, done: Callable[[], None]) -> None:
        self.num_rounds = 0
        self._num_needed = num_needed
        self._done = done

    def progress(self) -> None:
        self.num_rounds += 1
        if self.num_rounds == self._num_needed:
            self._done()


def a_stopped_push() -> Push:
    permit = WritePermit(5, 7, FakeClock(), 1e9)
    permit.stopped.set()
    with HostMemory() as memory:
        source = source_from(memory, host_blocks(memory), [])
    return Push(1, 1, permit, source)


def test_a_read_that_is_under_way_is_served_when_its_push_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(nixl_writer, "LINGER_S", WAIT_S)
    monkeypatch.setattr(nixl_writer, "TICK_S", nixl_agent.POLL_S)
    near, far = socket.socketpair()
    with near, far:
        agent = Serving(10, lambda: far.sendall(b"answer"))
        begun_s = time.monotonic()
        with pytest.raises(WriteStoppedError):
            nixl_writer._FetchedSource(agent).await_answer(near, a_stopped_push())
        assert agent.num_rounds == 10
        assert time.monotonic() - begun_s < WAIT_S / 2


def test_a_read_that_is_under_way_is_served_when_the_connection_is_cut(monkeypatch) -> None:
    monkeypatch.setattr(nixl_writer, "LINGER_S", 0.05)
    near, far = socket.socketpair()
    with near:
        far.close()
        agent = Serving(0, lambda: None)
        nixl_writer._FetchedSource(agent).await_answer(near, a_stopped_push())
        assert agent.num_rounds > 1


@needs_nixl
@pytest.mark.parametrize("ways", ["", "tcp,self", "tcp,cma,self"], ids=["all", "tcp", "shm"])
def test_another_process_hands_over_in_each_of_ucx_ways(ways: str) -> None:
    """In processes of their own: UCX reads its environment once.

    Beside a way that tells when a peer fails, which shared memory does not, UCX moves the bytes
    by cma: one process copies from the other's memory.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.fakes.kv_nixl_pair"],
        env=os.environ | ({"UCX_TLS": ways} if ways else {}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["handed over"]), done.stderr
