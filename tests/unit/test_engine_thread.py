"""The border between asyncio and the engine thread."""

import asyncio
import logging

import pytest

from engine.errors import (
    CapacityError,
    DuplicateRequestError,
    EngineDeadError,
    InvalidRequestError,
    UnknownRequestError,
)
from engine.request import FinishReason, Request, SamplingParams
from engine.runtime.commands import (
    ErrorEvent,
    KvComputedEvent,
    RequestEngine,
    SequenceMode,
    TokenEvent,
)
from engine.runtime.engine_thread import EngineThread
from engine.scheduling.block_hash import block_hashes
from tests.fakes.engine import ListSink, expected_tokens
from tests.fakes.step_engine import make_engine

PROMPT = tuple(range(1, 71))
LOCAL, PREFILL, DECODE = SequenceMode.LOCAL, SequenceMode.PREFILL, SequenceMode.DECODE


def request(request_id: str = "a", *, max_tokens: int = 5, prompt=PROMPT) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=sampling)


async def test_it_is_a_request_engine():
    async with EngineThread(make_engine()) as thread:
        engine: RequestEngine = thread
        assert engine.stats.num_blocks == 64


async def test_local_request_streams_its_tokens():
    sink, engine = ListSink(), make_engine()
    async with EngineThread(engine) as thread:
        thread.submit(request(), LOCAL, sink)
        assert await sink.wait_until_over("a") == expected_tokens(PROMPT, 5)
        assert thread.stats.num_free_blocks == 64
    assert engine.executor.thread_names == {"engine"}
    assert engine.executor.forgotten == ["a"]
    assert engine.executor.is_closed
    timing = next(e.first for e in sink.events if isinstance(e, TokenEvent))
    assert timing is not None
    assert timing.arrived_ns <= timing.scheduled_ns <= timing.done_ns


async def test_events_of_one_step_share_a_call():
    sink, engine = ListSink(), make_engine()
    async with EngineThread(engine) as thread:
        engine.executor.gate.clear()
        for index in range(4):
            thread.submit(request(str(index), prompt=(index + 1,)), LOCAL, sink)
        engine.executor.gate.set()
        for index in range(4):
            await sink.wait_until_over(str(index))
    # The first may have had a step alone.
    assert len(sink.batches) <= 6


async def test_engine_wakes_from_idle():
    sink = ListSink()
    async with EngineThread(make_engine()) as thread:
        for index in range(3):
            thread.submit(request(str(index)), LOCAL, sink)
            async with asyncio.timeout(5):
                await sink.wait_until_over(str(index))


async def test_abort_frees_blocks_and_silences_the_request():
    sink, engine = ListSink(), make_engine()
    async with EngineThread(engine) as thread:
        engine.executor.gate.clear()
        thread.submit(request(max_tokens=500), LOCAL, sink)
        await asyncio.to_thread(engine.executor.entered.wait)
        aborting = asyncio.ensure_future(thread.abort("a"))
        await asyncio.sleep(0)
        engine.executor.gate.set()
        assert await aborting == 5
        num_events = len(sink.events)
        assert thread.stats.num_free_blocks == 64
        thread.submit(request("b"), LOCAL, sink)
        await sink.wait_until_over("b")
        assert all(event.request_id == "b" for event in sink.events[num_events:])
        assert await thread.abort("a") == 0
        assert await thread.abort("never seen") == 0


async def test_answers_are_those_of_one_plan_at_a_time_and_end_while_plans_are_in_flight():
    """Two plans in flight; a request that is aborted meanwhile gives all of its blocks back."""
    sink, engine = ListSink(), make_engine(max_num_plans=2, max_num_batched_tokens=32)
    prompts = [tuple(range(index, 40 + 9 * index)) for index in range(5)]
    async with EngineThread(engine) as thread:
        for index, prompt in enumerate(prompts):
            thread.submit(request(str(index), prompt=prompt, max_tokens=30), LOCAL, sink)
        thread.submit(request("aborted", max_tokens=500), LOCAL, sink)
        await sink.wait_for_tokens("aborted", 1)
        assert await thread.abort("aborted") > 0
        for index, prompt in enumerate(prompts):
            assert await sink.wait_until_over(str(index)) == expected_tokens(prompt, 30)
        assert thread.stats.num_free_blocks == 64
    assert engine.executor.most_begun == 2


@pytest.mark.parametrize("mode", [LOCAL, PREFILL])
async def test_abort_takes_effect_at_the_end_of_the_step_that_runs(mode):
    """A prompt of three chunks, aborted in the first, is computed no further."""
    engine = make_engine(max_num_batched_tokens=32)
    async with EngineThread(engine) as thread:
        engine.executor.gate.clear()
        thread.submit(request(max_tokens=500), mode, ListSink())
        await asyncio.to_thread(engine.executor.entered.wait)
        aborting = asyncio.ensure_future(thread.abort("a"))
        await asyncio.sleep(0)
        engine.executor.gate.set()
        assert await aborting == 5
        assert (thread.stats.num_steps, thread.stats.num_free_blocks) == (1, 64)
    assert engine.stats.num_steps == 1


async def test_no_event_of_an_aborted_request_reaches_its_successor():
    first, second, engine = ListSink(), ListSink(), make_engine()
    async with EngineThread(engine) as thread:
        engine.executor.gate.clear()
        thread.submit(request(max_tokens=500), LOCAL, first)
        aborting = asyncio.ensure_future(thread.abort("a"))
        await asyncio.sleep(0)
        with pytest.raises(DuplicateRequestError):
            thread.submit(request(), LOCAL, second)
        engine.executor.gate.set()
        await aborting
        other = tuple(range(200, 230))
        thread.submit(request(prompt=other), LOCAL, second)
        assert await second.wait_until_over("a") == expected_tokens(other, 5)
    assert first.events == []


async def test_cancelled_abort_still_ends_the_request():
    engine = make_engine()
    async with EngineThread(engine) as thread:
        engine.executor.gate.clear()
        thread.submit(request(), LOCAL, ListSink())
        aborting = asyncio.ensure_future(thread.abort("a"))
        await asyncio.sleep(0)
        aborting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await aborting
        engine.executor.gate.set()
        await thread.abort("a")
        sink = ListSink()
        thread.submit(request(), LOCAL, sink)
        await sink.wait_until_over("a")


async def test_prefill_announces_then_holds_until_release():
    sink = ListSink()
    async with EngineThread(make_engine(max_num_batched_tokens=32)) as thread:
        thread.submit(request(), PREFILL, sink)
        assert await sink.wait_for_tokens("a", 1) == expected_tokens(PROMPT, 1)
        spans = [
            (e.first_token, e.num_tokens) for e in sink.events if isinstance(e, KvComputedEvent)
        ]
        assert spans == [(0, 32), (32, 32), (64, 6)]
        with pytest.raises(DuplicateRequestError):
            thread.submit(request(), PREFILL, sink)
        assert await thread.release("a") == 5
        assert await thread.release("a") == 0
        thread.submit(request(), PREFILL, sink)


@pytest.mark.parametrize("submit_first", [True, False])
async def test_handed_over_request_decodes(submit_first):
    sink = ListSink()
    async with EngineThread(make_engine()) as thread:
        if submit_first:
            thread.submit(request(), DECODE, sink)
        reservation = await thread.reserve("a", len(PROMPT), block_hashes(PROMPT, 16))
        assert len(reservation.block_ids) == 5
        await thread.commit("a", expected_tokens(PROMPT, 1)[0])
        if not submit_first:
            thread.submit(request(), DECODE, sink)
        assert await sink.wait_until_over("a") == expected_tokens(PROMPT, 5)[1:]
        assert thread.stats.num_prefill_tokens == 0
        assert thread.stats.num_free_blocks == 64


async def test_reservations_wait_for_blocks_in_order():
    async with EngineThread(make_engine(num_blocks=5)) as thread:
        await thread.reserve("a", 70, [])
        second = asyncio.ensure_future(thread.reserve("b", 70, []))
        third = asyncio.ensure_future(thread.reserve("c", 10, []))
        assert await thread.cancel_reservation("never seen") == 0
        assert not second.done()
        assert await thread.cancel_reservation("a") == 5
        assert len((await second).block_ids) == 5
        assert not third.done()
        assert await thread.abort("b") == 5
        assert len((await third).block_ids) == 1


async def test_cancelled_reservation_gives_up_its_place():
    async with EngineThread(make_engine(num_blocks=5)) as thread:
        await thread.reserve("a", 70, [])
        second = asyncio.ensure_future(thread.reserve("b", 70, []))
        await asyncio.sleep(0)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await thread.cancel_reservation("a")
        assert thread.stats.num_free_blocks == 5
        await thread.reserve("b", 70, [])


async def test_waiting_reservation_that_is_cancelled_by_another_is_told():
    async with EngineThread(make_engine(num_blocks=5)) as thread:
        await thread.reserve("a", 70, [])
        waiting = asyncio.ensure_future(thread.reserve("b", 70, []))
        await asyncio.sleep(0)
        assert await thread.cancel_reservation("b") == 0
        with pytest.raises(UnknownRequestError):
            await waiting


async def test_refusals_raise_where_they_are_asked():
    async with EngineThread(make_engine(num_blocks=5)) as thread:
        with pytest.raises(InvalidRequestError):
            thread.submit(request(prompt=()), LOCAL, ListSink())
        with pytest.raises(InvalidRequestError):
            thread.submit(request(max_tokens=50), LOCAL, ListSink())
        with pytest.raises(CapacityError):
            await thread.reserve("a", 81, [])
        with pytest.raises(UnknownRequestError):
            await thread.commit("a", 1)
        thread.submit(request(max_tokens=5), LOCAL, sink := ListSink())
        with pytest.raises(DuplicateRequestError):
            thread.submit(request(max_tokens=5), LOCAL, sink)
        assert await sink.wait_until_over("a") == expected_tokens(PROMPT, 5)


async def test_committed_kv_that_nobody_claims_is_freed(caplog):
    thread = EngineThread(make_engine(), unclaimed_commit_timeout_s=0.01)
    async with thread:
        await thread.reserve("a", 70, [])
        with caplog.at_level(logging.WARNING):
            await thread.commit("a", 1)
            async with asyncio.timeout(5):
                await thread.reserve("whole pool", 64 * 16, [])
        assert "never claimed" in caplog.text
        with pytest.raises(UnknownRequestError):
            await thread.commit("a", 1)


async def test_death_fails_every_request_and_waiter():
    first, second, engine = ListSink(), ListSink(), make_engine(num_blocks=5)
    async with EngineThread(engine) as thread:
        await thread.reserve("held", 30, [])
        waiting = asyncio.ensure_future(thread.reserve("waiting", 80, []))
        await asyncio.sleep(0)
        thread.submit(request("a", prompt=(1, 2)), LOCAL, first)
        thread.submit(request("b", prompt=(1, 2)), DECODE, second)
        engine.executor.failure = RuntimeError("the device fell off the bus")
        thread.submit(request("c", prompt=(1, 2)), LOCAL, first)
        async with asyncio.timeout(5):
            await thread.dead.wait()
        assert isinstance(second.events[-1], ErrorEvent)
        assert isinstance(first.events[-1], ErrorEvent)
        assert isinstance(first.events[-1].error, EngineDeadError)
        with pytest.raises(EngineDeadError):
            await waiting
        with pytest.raises(EngineDeadError):
            thread.submit(request("d"), LOCAL, first)
        with pytest.raises(EngineDeadError):
            await thread.abort("a")
    assert engine.executor.is_closed


async def test_failed_start_is_raised_by_the_context():
    engine = make_engine()
    engine.executor.warm_up_failure = MemoryError("not enough")
    with pytest.raises(MemoryError, match="not enough"):
        async with EngineThread(engine):
            pass
    assert engine.executor.is_closed


async def test_stopping_tells_what_still_runs():
    sink = ListSink()
    async with EngineThread(make_engine()) as thread:
        thread.submit(request(), DECODE, sink)
    assert isinstance(sink.events[-1], ErrorEvent)
    assert not thread.dead.is_set()


async def test_first_token_may_end_a_prefill_and_still_hold_its_blocks():
    sink = ListSink()
    async with EngineThread(make_engine()) as thread:
        thread.submit(request(max_tokens=1), PREFILL, sink)
        await sink.wait_until_over("a")
        last = sink.events[-1]
        assert isinstance(last, TokenEvent)
        assert last.finish_reason is FinishReason.LENGTH
        assert await thread.release("a") == 5


async def test_random_use_leaves_every_block_free():
    import random

    rng = random.Random(4)
    sink, engine = ListSink(), make_engine(num_blocks=24)

    async def one(index: int, thread: EngineThread) -> None:
        request_id, num_prompt = str(index), rng.randrange(1, 120)
        one_request = request(request_id, prompt=tuple(range(num_prompt)), max_tokens=9)
        mode = rng.choice([LOCAL, PREFILL, DECODE])
        thread.submit(one_request, mode, sink)
        await asyncio.sleep(rng.random() * 0.003)
        if mode is DECODE:
            await thread.reserve(request_id, num_prompt, block_hashes(range(num_prompt), 16))
            if rng.random() < 0.7:
                await thread.commit(request_id, expected_tokens(range(num_prompt), 1)[0])
        if rng.random() < 0.3:
            await thread.abort(request_id)
        elif mode is LOCAL:
            answer = await sink.wait_until_over(request_id)
            assert answer == expected_tokens(range(num_prompt), 9)
        elif mode is PREFILL:
            await sink.wait_for_tokens(request_id, 1)
            assert await thread.release(request_id) >= 0
        await thread.abort(request_id)

    async with EngineThread(engine) as thread, asyncio.timeout(30):
        async with asyncio.TaskGroup() as tasks:
            for index in range(80):
                tasks.create_task(one(index, thread))
        assert thread.stats.num_free_blocks == 24
        engine.scheduler.check_conservation()


async def test_a_step_that_does_not_end_is_told_and_nobody_waits_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sink, engine = ListSink(), make_engine()
    async with EngineThread(engine, step_timeout_s=0.05) as thread:
        engine.executor.gate.clear()
        thread.submit(request(), LOCAL, sink)
        async with asyncio.timeout(5):
            await thread.dead.wait()
        (event,) = sink.events
        assert isinstance(event, ErrorEvent)
        assert isinstance(event.error, EngineDeadError)
        assert str(event.error) == "a step of the engine has not ended within step_timeout_s=0.05"
        with pytest.raises(EngineDeadError):
            thread.submit(request("b"), LOCAL, sink)
    assert not engine.executor.is_closed
    assert "the engine thread is stuck" in caplog.text
    engine.executor.gate.set()  # the thread ends


async def test_an_idle_engine_is_not_stuck() -> None:
    sink, engine = ListSink(), make_engine()
    async with EngineThread(engine, step_timeout_s=0.3) as thread:
        thread.submit(request(), LOCAL, sink)
        await sink.wait_until_over("a")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await thread.dead.wait()
