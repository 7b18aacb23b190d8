"""The address under which a rank is found: what the routes say, or ranks of other hosts."""

from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore
from torch.distributed import DistStoreError

from engine.parallel import host_address
from engine.parallel.host_address import address_towards, agreed_address

MASTER = "first.example"


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """By destination: which own address leads there."""
    found: dict[str, str] = {}
    monkeypatch.setattr(host_address, "address_towards", found.__getitem__)
    return found


def test_ranks_of_this_host_meet_on_the_loopback() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"


def test_the_way_to_the_first_rank_is_asked_for(routes: dict[str, str]) -> None:
    routes[MASTER] = "10.0.0.2"
    assert agreed_address(HashStore(), 1, 2, master_address=MASTER) == "10.0.0.2"


def test_a_name_that_means_this_host_is_no_address_for_others(routes: dict[str, str]) -> None:
    routes.update({MASTER: "127.0.0.1", "10.0.0.2": "10.0.0.1"})
    store = HashStore()
    store.set("address/1", "127.0.1.1")
    store.set("address/2", "10.0.0.2")
    assert agreed_address(store, 0, 3, master_address=MASTER) == "10.0.0.1"


def test_where_all_are_on_one_host_they_stay_on_it(routes: dict[str, str]) -> None:
    routes[MASTER] = "127.0.0.1"
    store = HashStore()
    store.set("address/1", "127.0.0.1")
    assert agreed_address(store, 0, 2, master_address=MASTER) == "127.0.0.1"


def test_a_rank_that_does_not_come_is_not_waited_for_for_ever(routes: dict[str, str]) -> None:
    routes[MASTER] = "127.0.0.1"
    store = HashStore()
    store.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(DistStoreError):
        agreed_address(store, 0, 2, master_address=MASTER)


def test_what_is_no_address_is_refused(routes: dict[str, str]) -> None:
    routes[MASTER] = "127.0.0.1"
    store = HashStore()
    store.set("address/1", "somewhere; else")
    with pytest.raises(ValueError, match="somewhere"):
        agreed_address(store, 0, 2, master_address=MASTER)
