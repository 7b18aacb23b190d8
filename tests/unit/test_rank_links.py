"""Connections among ranks of several hosts: both ends in one process."""

import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed import DistStoreError

from engine.errors import CollectiveTimeoutError
from engine.parallel.rank_links import OtherCallError, RankLinks, open_links

LARGE = 4_000_000  # more than lies in the buffers between two sockets


def opened(store: Store, index: int, size: int, timeout_s: float = 10.0) -> RankLinks:
    return open_links(store, index, size, own_address="127.0.0.1", timeout_s=timeout_s)


@pytest.fixture
def ends() -> Iterator[tuple[RankLinks, RankLinks]]:
    """Of rank 0 and of rank 1."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    first, second = RankLinks({1: near}), RankLinks({0: far})
    yield first, second
    first.close()
    second.close()


def numbers(length: int, start: int) -> torch.Tensor:
    return torch.arange(start, start + length, dtype=torch.int32)


def test_both_send_more_than_the_kernel_holds(ends: tuple[RankLinks, RankLinks]) -> None:
    sent = [numbers(LARGE, 0), numbers(LARGE, 7)]
    found = [torch.empty_like(x) for x in sent]
    going = [
        links.begin("x", {1 - index: sent[index]}, {1 - index: found[index]})
        for index, links in enumerate(ends)
    ]
    while not all([each.is_over(0.001) for each in going]):  # noqa: C419  # both must go on
        pass
    assert torch.equal(found[0], sent[1])
    assert torch.equal(found[1], sent[0])


def test_several_are_on_their_way_and_end_in_their_order(ends: tuple[RankLinks, RankLinks]) -> None:
    near, far = ends
    sent = [numbers(length, length) for length in (3, LARGE, 0, 5)]
    found = [torch.empty_like(x) for x in sent]
    sending = [near.begin("x", {1: x}, {}) for x in sent]
    receiving = [far.begin("x", {}, {0: x}) for x in found]
    while not receiving[-1].is_over(0.0):
        sending[-1].is_over(0.0)
    assert all(each.is_over(0.0) for each in [*sending, *receiving])
    assert all(torch.equal(x, y) for x, y in zip(found, sent, strict=True))


def test_what_began_travels_before_anybody_waits(ends: tuple[RankLinks, RankLinks]) -> None:
    near, far = ends
    near.begin("x", {1: numbers(1000, 1)}, {})
    found = torch.zeros(1000, dtype=torch.int32)
    assert far.begin("x", {}, {0: found}).is_over(10.0)
    assert torch.equal(found, numbers(1000, 1))


def test_another_size_is_told(ends: tuple[RankLinks, RankLinks]) -> None:
    near, far = ends
    near.begin("x", {1: torch.zeros(5)}, {})
    with pytest.raises(OtherCallError, match="16 bytes were expected, 20 come") as caught:
        far.begin("x", {}, {0: torch.zeros(4)}).is_over(10.0)
    assert caught.value.index == 0


def test_another_call_of_the_same_size_is_told(ends: tuple[RankLinks, RankLinks]) -> None:
    near, far = ends
    near.begin("gather", {1: torch.zeros(4)}, {})
    with pytest.raises(OtherCallError, match="16 come of another call"):
        far.begin("sum", {}, {0: torch.zeros(4)}).is_over(10.0)


def test_a_connection_that_ends_is_an_error(ends: tuple[RankLinks, RankLinks]) -> None:
    near, far = ends
    going = far.begin("x", {}, {0: torch.zeros(4)})
    assert not going.is_over(0.0)
    near.close()
    with pytest.raises(ConnectionError):
        going.is_over(10.0)


def test_a_stranger_does_not_become_a_rank() -> None:
    store = HashStore()
    opening: list[RankLinks] = []
    thread = threading.Thread(target=lambda: opening.append(opened(store, 0, 2)))
    thread.start()
    place = json.loads(store.get("link/0"))
    with socket.create_connection((place["host"], place["port"])) as stranger:
        stranger.sendall(b"\x01\0\0\0" + 32 * b"?")
        far = opened(store, 1, 2)
        thread.join(10.0)
        assert stranger.recv(1) == b""
    (near,) = opening
    found = torch.zeros(3)
    near.begin("x", {1: torch.ones(3)}, {})
    assert far.begin("x", {}, {0: found}).is_over(10.0)
    assert found.tolist() == [1.0, 1.0, 1.0]
    near.close()
    far.close()


def test_a_rank_that_does_not_come_is_told() -> None:
    with pytest.raises(CollectiveTimeoutError, match=r"within 0.05 s: numbers \[1, 2\]: timed out"):
        opened(HashStore(), 0, 3, timeout_s=0.05)


def test_a_rank_that_cannot_be_reached_is_told() -> None:
    store = HashStore()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    store.set("link/0", json.dumps({"host": "127.0.0.1", "port": port, "token": "x"}))
    with pytest.raises(CollectiveTimeoutError, match=f"number 0 at 127.0.0.1 port {port}: .*refus"):
        opened(store, 1, 2)


def test_a_stranger_who_says_nothing_does_not_make_the_wait_longer() -> None:
    store = HashStore()
    errors: list[Exception] = []

    def wait() -> None:
        try:
            opened(store, 0, 2, timeout_s=0.3)
        except CollectiveTimeoutError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    place = json.loads(store.get("link/0"))
    with socket.create_connection((place["host"], place["port"])):
        thread.join(4.0)
        assert not thread.is_alive()
    assert len(errors) == 1


def test_a_rank_that_gives_up_closes_what_it_has() -> None:
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.05))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = {"host": "127.0.0.1", "port": listener.getsockname()[1], "token": 32 * "x"}
        store.set("link/0", json.dumps(place))
        with pytest.raises(DistStoreError):  # nobody is number 1
            opened(store, 2, 3)
        connection, _ = listener.accept()
        with connection:
            connection.settimeout(5.0)
            assert connection.recv(100) == b"\x02\0\0\0" + 32 * b"x"
            assert connection.recv(1) == b""


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(ValueError, match=r"cannot listen on 192\.0\.2\.1"):
        open_links(HashStore(), 0, 2, own_address="192.0.2.1", timeout_s=1.0)
