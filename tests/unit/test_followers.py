"""Rank 0's end of the connections to the other ranks of its worker: how a worker ends in order."""

import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from engine.runtime.followers import Followers
from engine.runtime.rank_message import Stop, decode_from_leader
from engine.runtime.rank_socket import RankSocket

WAIT_S = 20.0


def connected(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        there = stack.enter_context(socket.create_connection(listener.getsockname()))
        return stack.enter_context(listener.accept()[0]), there


@pytest.fixture
def ranks() -> Iterator[tuple[dict[int, RankSocket], dict[int, RankSocket]]]:
    """Rank 0's sockets by rank, and the other ranks' to it."""
    with ExitStack() as stack:
        here, there = {}, {}
        for rank in (1, 2):
            ends = connected(stack)
            here[rank] = RankSocket(ends[0], rank, send_timeout_s=WAIT_S)
            there[rank] = RankSocket(ends[1], 0, send_timeout_s=WAIT_S)
        yield here, there


def sees_the_end(follower: RankSocket, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(follower.fileno(), select.POLLRDHUP)
    return bool(poll.poll(timeout_s * 1000))


def test_rank_0_leaves_after_all_others(ranks) -> None:
    here, there = ranks
    followers = Followers(here, timeout_s=WAIT_S)
    closing = threading.Thread(target=followers.close)
    closing.start()
    for follower in there.values():
        assert isinstance(decode_from_leader(follower.receive()), Stop)
    # One that is still computing must not take rank 0 for dead.
    assert not sees_the_end(there[1], 0.1)
    there[2].close()
    assert not sees_the_end(there[1], 0.1)
    there[1].close()
    closing.join(WAIT_S)
    assert not closing.is_alive()


def test_a_rank_that_does_not_end_is_left_in_the_end(ranks, caplog) -> None:
    here, there = ranks
    there[2].close()
    Followers(here, timeout_s=0.05).close()
    assert "ranks [1] did not end within 0.05 s" in caplog.text
    assert sees_the_end(there[1], WAIT_S)
