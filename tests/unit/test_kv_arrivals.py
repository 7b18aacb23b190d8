"""Which prefixes on their way are worth waiting for."""

import asyncio

import pytest

from engine.scheduling.block_hash import block_hashes
from kv_transfer import arrivals
from kv_transfer.arrivals import Arrivals
from kv_transfer.lease import Lease, LeaseTable
from tests.fakes.clock import FakeClock

SIZE = 4


class Line:
    """Requests of one receiver, by their prompts."""

    def __init__(self) -> None:
        self.arrivals = Arrivals(SIZE)
        self._table = LeaseTable(FakeClock(), max_lease_s=1, max_hold_s=10)
        self._num_requests = 0

    def expect(self, prompt: list[int]) -> Lease:
        self._num_requests += 1
        lease = self._table.wait(f"r{self._num_requests}", owner="p", num_tokens=len(prompt))
        self.arrivals.expect(lease, block_hashes(prompt, SIZE))
        return lease

    async def waits(self, prompt: list[int]) -> bool:
        """Whether a request with this prompt would wait now."""
        wait = asyncio.ensure_future(self.arrivals.wait(len(prompt), block_hashes(prompt, SIZE)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        is_waiting = not wait.done()
        wait.cancel()
        await asyncio.wait([wait])
        return is_waiting


@pytest.mark.parametrize(
    ("theirs", "ours", "waits"),
    [
        (range(13), range(13), True),
        (range(16), range(12), True),
        (range(16), [*range(8), 90, 91, 92, 93, 94, 95], True),
        (range(16), [*range(4), *range(90, 110)], False),  # most of it is ours alone
        (range(100), range(13), False),  # theirs takes much longer
        (range(13), range(3), False),  # no full block
        (range(13), range(50, 63), False),
        ([99, *range(12)], range(13), False),  # the same tokens behind others
    ],
    ids=[
        *("the-same", "a-part-of-it", "half-of-it", "little-of-it", "of-a-long-one"),
        *("less-than-a-block", "another", "elsewhere"),
    ],
)
async def test_what_is_worth_waiting_for(theirs, ours, waits: bool) -> None:
    line = Line()
    lease = line.expect(list(theirs))
    assert await line.waits(list(ours)) is waits
    line.arrivals.end(lease)
    assert not await line.waits(list(ours))


async def test_what_the_receiver_holds_already_does_not_count() -> None:
    line = Line()
    earlier = line.expect(list(range(80)))
    line.arrivals.end(earlier)
    line.expect(list(range(100)))  # 0 to 80 are expected again: nobody has told us of the cache
    assert not await line.waits(list(range(13)))
    assert await line.waits(list(range(90)))


async def test_of_several_one_goes_ahead_and_the_others_wait_for_it() -> None:
    line = Line()
    prompt = list(range(13))
    first = line.expect(prompt)
    order: list[str] = []

    async def come(name: str) -> None:
        await line.arrivals.wait(len(prompt), block_hashes(prompt, SIZE))
        lease = line.expect(prompt)
        order.append(name)
        await asyncio.sleep(0)
        line.arrivals.end(lease)
        order.append(f"{name} is over")

    async with asyncio.TaskGroup() as tasks:
        for name in ("a", "b"):
            tasks.create_task(come(name))
        await asyncio.sleep(0)
        assert order == []
        line.arrivals.end(first)
    assert order == ["a", "a is over", "b", "b is over"]


async def test_patience_ends(monkeypatch) -> None:
    monkeypatch.setattr(arrivals, "PATIENCE_S", 0.01)
    line = Line()
    prompt = list(range(13))
    line.expect(prompt)
    async with asyncio.timeout(10):
        await line.arrivals.wait(len(prompt), block_hashes(prompt, SIZE))


async def test_an_end_is_noted_once_and_of_the_right_lease() -> None:
    line = Line()
    prompt = list(range(13))
    first, second = line.expect(prompt), line.expect(prompt)
    line.arrivals.end(second)
    assert await line.waits(prompt)
    line.arrivals.end(first)
    line.arrivals.end(first)
    assert not await line.waits(prompt)


async def test_a_hash_that_comes_twice_ends_once() -> None:
    line = Line()
    prompt = list(range(13))
    lease = line.expect(prompt)
    line.arrivals.end(lease)
    first, second, _ = block_hashes(prompt, SIZE)
    line.arrivals.expect(lease, [first, second, first])
    assert await line.waits(prompt)
    line.arrivals.end(lease)
    assert not await line.waits(prompt)
