"""The fake engine keeps the contract that other teams' tests rely on."""

import asyncio

import pytest

from engine.errors import EngineDeadError
from engine.request import FinishReason, Request, SamplingParams
from engine.runtime.commands import ErrorEvent, KvComputedEvent, SequenceMode, TokenEvent
from engine.scheduling.block_hash import block_hashes
from tests.fakes.engine import FakeEngine, ListSink, expected_tokens

PROMPT = tuple(range(1, 71))


def request(request_id: str, *, max_tokens: int = 5) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=request_id, prompt_token_ids=PROMPT, sampling=sampling)


async def test_local_request_draws_the_expected_tokens():
    engine, sink = FakeEngine(), ListSink()
    engine.submit(request("a"), SequenceMode.LOCAL, sink)
    assert await sink.wait_until_over("a") == expected_tokens(PROMPT, 5)
    assert engine.block_pool.num_free == engine.block_pool.num_blocks


async def test_prefill_announces_every_token_once_and_holds_blocks():
    engine, sink = FakeEngine(), ListSink()
    engine.submit(request("a"), SequenceMode.PREFILL, sink)
    await sink.wait_for_tokens("a", 1)
    ranges = [
        (event.first_token, event.num_tokens)
        for event in sink.events
        if isinstance(event, KvComputedEvent)
    ]
    assert ranges == [(0, 32), (32, 32), (64, 6)]
    assert engine.stats.num_free_blocks == engine.stats.num_blocks - 5
    assert await engine.release("a") == 5


@pytest.mark.parametrize("submit_first", [True, False])
async def test_decode_joins_in_either_order(submit_first):
    engine, sink = FakeEngine(), ListSink()
    if submit_first:
        engine.submit(request("a"), SequenceMode.DECODE, sink)
    reservation = await engine.reserve("a", len(PROMPT), block_hashes(PROMPT, 16))
    assert len(reservation.block_ids) == 5
    await engine.commit("a", expected_tokens(PROMPT, 1)[0])
    if not submit_first:
        engine.submit(request("a"), SequenceMode.DECODE, sink)
    assert await sink.wait_until_over("a") == expected_tokens(PROMPT, 5)[1:]
    last = sink.events[-1]
    assert isinstance(last, TokenEvent)
    assert last.finish_reason is FinishReason.LENGTH
    assert engine.stats.num_prefill_tokens == 0


async def test_reservation_waits_until_blocks_are_free():
    engine = FakeEngine(num_blocks=5)
    await engine.reserve("a", 70, [])
    waiting = asyncio.ensure_future(engine.reserve("b", 70, []))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert await engine.cancel_reservation("a") == 5
    assert len((await waiting).block_ids) == 5


async def test_crash_fails_every_sink():
    engine, sink = FakeEngine(), ListSink()
    engine.stall()
    engine.submit(request("a"), SequenceMode.LOCAL, sink)
    engine.crash()
    assert isinstance(sink.events[0], ErrorEvent)
    with pytest.raises(EngineDeadError):
        engine.submit(request("b"), SequenceMode.LOCAL, sink)
