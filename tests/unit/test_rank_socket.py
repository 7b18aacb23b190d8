"""Sockets between ranks: only ranks get in, frames are bounded, an end is told with its rank."""

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from engine.errors import CollectiveTimeoutError, RankDeadError
from engine.parallel.axes import AxisGroup
from engine.runtime.rank_message import (
    Hello,
    RankReport,
    RankTimes,
    Stop,
    decode_from_follower,
    encode,
)
from engine.runtime.rank_socket import RankSocket, accept_followers, connect_to_leader

TIMEOUTS: dict[str, Any] = {"timeout_s": 20.0, "send_timeout_s": 0.2}


@dataclass(frozen=True)
class ThreadBroadcast:
    """A broadcast among threads; the only collective that meeting needs."""

    rank: int
    queue: SimpleQueue[torch.Tensor]

    def broadcast(self, x: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        if self.rank == source:
            self.queue.put(x.clone())
        else:
            x.copy_(self.queue.get())


def worlds() -> tuple[AxisGroup, AxisGroup]:
    queue: SimpleQueue[torch.Tensor] = SimpleQueue()
    first, second = (
        AxisGroup(rank, 2, ThreadBroadcast(rank, queue))  # type: ignore[arg-type]
        for rank in (0, 1)
    )
    return first, second


@pytest.fixture
def pair() -> Iterator[tuple[RankSocket, RankSocket]]:
    """Rank 0's socket to rank 1, and rank 1's to rank 0."""
    leading, following = worlds()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(accept_followers, leading, "127.0.0.1", **TIMEOUTS)
        follower = connect_to_leader(following, **TIMEOUTS)
        leader = accepted.result()[1]
    yield leader, follower
    leader.close()
    follower.close()


def send_often(to: RankSocket, frame: bytes | bytearray) -> None:
    for _ in range(1000):
        to.send_frame(frame)


def test_messages_go_both_ways(pair: tuple[RankSocket, RankSocket]) -> None:
    to_follower, to_leader = pair
    report = RankReport(RankTimes(rank=1, num_steps=3))
    to_leader.send(report)
    assert decode_from_follower(to_follower.receive()) == report
    assert not to_leader.has_data(0)
    to_follower.send(Stop())
    assert to_leader.has_data(5)


def test_the_other_sides_end_is_told_with_its_rank(pair: tuple[RankSocket, RankSocket]) -> None:
    to_follower, to_leader = pair
    to_leader.close()
    with pytest.raises(RankDeadError, match="rank 1 is gone") as raised:
        to_follower.receive()
    assert raised.value.rank == 1
    with pytest.raises(RankDeadError):  # the first may still go into a buffer
        send_often(to_follower, encode(Stop()))


def test_a_frame_that_is_too_long_is_refused_before_it_is_read(
    pair: tuple[RankSocket, RankSocket],
) -> None:
    to_follower, to_leader = pair
    to_follower.send_frame((1 << 30).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=r"rank 0 announces a message of 1073741824 bytes"):
        to_leader.receive()


def test_a_rank_that_reads_nothing_is_named_after_the_time_out(
    pair: tuple[RankSocket, RankSocket],
) -> None:
    to_follower, _ = pair
    with pytest.raises(CollectiveTimeoutError, match=r"rank 1 took no step plan for 0\.2 s"):
        send_often(to_follower, bytes(1 << 20))


@pytest.mark.parametrize(
    "hello",
    [
        bytes(encode(Hello(1, "0" * 32))),
        bytes(encode(Stop())),
        (1 << 31).to_bytes(4, "little"),
        b"GET / HTTP/1.1\r\n\r\n",
        b"",
    ],
    ids=["wrong-token", "no-hello", "too-long", "http", "nothing"],
)
def test_a_stranger_is_turned_away_and_the_rank_gets_in(hello: bytes) -> None:
    leading, following = worlds()
    told: SimpleQueue[dict[str, Any]] = SimpleQueue()

    def overhear(data: bytes, *args: Any, **kwargs: Any) -> bytes:
        told.put(json.loads(data))
        return data

    with ThreadPoolExecutor(1) as pool:
        world = Overheard(leading, overhear)
        accepted = pool.submit(accept_followers, world, "127.0.0.1", **TIMEOUTS)  # type: ignore[arg-type]
        address = told.get()
        with socket.create_connection((address["host"], address["port"])) as stranger:
            stranger.sendall(hello)
            with contextlib.suppress(OSError):  # closed with what it sent unread: a reset
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b"", "turned away"
            follower = connect_to_leader(Told(following, address), **TIMEOUTS)  # type: ignore[arg-type]
            (leader,) = accepted.result().values()
    leader.close()
    follower.close()


def test_a_rank_that_does_not_come_is_named() -> None:
    leading, following = worlds()
    hearing = threading.Thread(target=lambda: following.broadcast_bytes(None, max_bytes=1024))
    hearing.start()
    with pytest.raises(CollectiveTimeoutError, match=r"ranks \[1\] did not connect to rank 0"):
        accept_followers(leading, "127.0.0.1", timeout_s=0.1, send_timeout_s=1.0)
    hearing.join()


def test_an_address_of_another_host_is_told() -> None:
    leading, _ = worlds()
    with pytest.raises(ValueError, match="MASTER_ADDR must be an address of its host"):
        accept_followers(leading, "192.0.2.1", **TIMEOUTS)


@dataclass(frozen=True)
class Overheard:
    """Rank 0's world, with somebody who hears the address."""

    world: AxisGroup
    broadcast_bytes: Any

    @property
    def size(self) -> int:
        return self.world.size


@dataclass(frozen=True)
class Told:
    """Rank 1's world, where the address came already."""

    world: AxisGroup
    address: dict[str, Any]

    @property
    def rank(self) -> int:
        return self.world.rank

    def broadcast_bytes(self, data: None, source: int, *, max_bytes: int) -> bytes:
        return json.dumps(self.address).encode()
