"""The watch over ranks of other hosts: who is to blame when several go."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from torch._C._distributed_c10d import HashStore, Store

from engine.parallel.store_watch import StoreWatch
from engine.parallel.verdict import Verdict, VerdictKind

DEAD_1 = Verdict(VerdictKind.DEAD, 1)
TIMEOUT_S = 20.0


class InterruptedStore:
    """A store with which something happens just before the beats are read."""

    def __init__(self, store: Store) -> None:
        self.before_reading: Callable[[], None] | None = None
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        happening, self.before_reading = self.before_reading, None
        if happening is not None:
            happening()
        return self._store.multi_get(keys)


@contextmanager
def watches(*stores: Any) -> Iterator[list[StoreWatch]]:
    """One for each store, as of ranks that start at the same time."""
    found: dict[int, StoreWatch] = {}

    def start(rank: int, store: Any) -> None:
        found[rank] = StoreWatch(cast("Store", store), rank, len(stores))

    threads = [threading.Thread(target=start, args=each) for each in enumerate(stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ExitStack() as stack:
        for watch in found.values():
            stack.callback(watch.close)
        yield [found[rank] for rank in range(len(stores))]


def wait_for(is_so: Callable[[], bool]) -> None:
    end_s = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.0005)


def test_who_leaves_because_of_a_death_is_not_blamed_for_it() -> None:
    store = HashStore()
    interrupted = InterruptedStore(store)
    with watches(interrupted, store, store) as (first, _, last):

        def go() -> None:
            last.post(DEAD_1)
            last.close()

        interrupted.before_reading = go
        wait_for(lambda: first.lost([0, 1, 2]) is not None)
        assert first.lost([0, 1, 2]) == Verdict(VerdictKind.LEFT, 2)
        assert first.verdict() == DEAD_1


def test_a_rank_that_leaves_without_trouble_is_seen_to_have_left() -> None:
    store = HashStore()
    with watches(store, store) as (first, last):
        last.close()
        wait_for(lambda: first.lost([0, 1]) is not None)
        assert first.lost([0, 1]) == Verdict(VerdictKind.LEFT, 1)
        assert first.verdict() is None


def test_all_ranks_find_the_first_verdict() -> None:
    store = HashStore()
    with watches(store, store, store) as ranks:
        ranks[2].post(DEAD_1)
        ranks[2].post(Verdict(VerdictKind.DEAD, 0))
        wait_for(lambda: all(watch.verdict() is not None for watch in ranks))
        assert [watch.verdict() for watch in ranks] == [DEAD_1] * 3
