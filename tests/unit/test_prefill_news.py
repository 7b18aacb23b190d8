"""News of computed KV: later ones stand for earlier ones of the same tokens."""

import asyncio

from engine.runtime.commands import KvComputedEvent, TokenEvent
from prefill_worker.prefill import _newest

TOKEN = TokenEvent("r", 7, None, None, None)


def news(first_token: int, num_layers: int | None) -> KvComputedEvent:
    return KvComputedEvent("r", (1, 2), first_token, 4, num_layers)


async def taken(*events: KvComputedEvent | TokenEvent) -> list[KvComputedEvent | TokenEvent]:
    queue: asyncio.Queue[KvComputedEvent | TokenEvent] = asyncio.Queue()
    for event in events:
        queue.put_nowait(event)
    found = []
    while not queue.empty():
        found.append(await _newest(queue))
    return found


async def test_layers_wait_for_nobody() -> None:
    assert await taken(news(0, 1)) == [news(0, 1)]


async def test_of_several_layers_the_last_is_pushed() -> None:
    assert await taken(news(0, 1), news(0, 2), news(0, 3)) == [news(0, 3)]


async def test_a_whole_chunk_stands_for_its_layers_but_not_for_the_next_chunk() -> None:
    events = (news(0, 1), news(0, None), news(4, 2), news(4, None), TOKEN)
    assert await taken(*events) == [news(0, None), news(4, None), TOKEN]
