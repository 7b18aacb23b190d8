"""Requests shared out over data shards: where they go, that they stay there, whose blocks."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UnknownRequestError
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode, TokenEvent
from engine.runtime.rank_message import check_plan
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.data_shard import plans_by_shard, with_pool_blocks
from engine.scheduling.limits import EngineLimits
from engine.scheduling.sharded_scheduler import ShardedScheduler
from engine.scheduling.step_plan import DrawnToken, ScheduledChunk, StepPlan

LOCAL, PREFILL, DECODE = SequenceMode.LOCAL, SequenceMode.PREFILL, SequenceMode.DECODE
NUM_BLOCKS, BLOCK_SIZE = 16, 4
BUDGET = 24


def make(num_shards: int = 2, num_blocks: int = NUM_BLOCKS) -> ShardedScheduler:
    limits = EngineLimits(
        vocab_size=1000,
        max_context_tokens=200,
        num_blocks=num_blocks,
        block_size_tokens=BLOCK_SIZE,
        num_data_shards=num_shards,
    )
    return ShardedScheduler(limits, max_num_sequences=8, eos_token_ids=frozenset())


def request(name: str, num_prompt: int, *, first: int = 0, max_tokens: int = 3) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=tuple(range(first, first + num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def shard_of(scheduler: ShardedScheduler, name: str) -> int:
    return next(i for i, shard in enumerate(scheduler.shards) if shard.is_known(name))


def step(scheduler: ShardedScheduler) -> tuple[StepPlan, dict[str, int]]:
    """One step in which each sequence draws its own length; returns what was drawn."""
    plan, _ = scheduler.schedule(BUDGET, 1)
    drawn = [
        DrawnToken(scheduler.sequence(chunk.request_id).num_tokens, None)
        for chunk in plan.chunks
        if chunk.is_drawing
    ]
    events = scheduler.commit(plan, drawn, 2)
    return plan, {e.request_id: e.token_id for e in events if isinstance(e, TokenEvent)}


def finish(scheduler: ShardedScheduler) -> None:
    while step(scheduler)[0].chunks:
        pass


def test_requests_are_shared_out_and_each_shard_uses_its_own_blocks() -> None:
    scheduler = make(num_shards=3)
    for index in range(6):
        scheduler.submit(request(f"r{index}", 6, first=100 * index), LOCAL, 0)
    assert [shard.num_waiting for shard in scheduler.shards] == [2, 2, 2]
    plan, drawn = step(scheduler)
    assert drawn == {f"r{index}": 6 for index in range(6)}
    for index, part in enumerate(plans_by_shard(plan, 3, NUM_BLOCKS)):
        assert {shard_of(scheduler, chunk.request_id) for chunk in part.chunks} == {index}
        for chunk in with_pool_blocks(part, index, NUM_BLOCKS).chunks:
            assert all(0 <= block_id < NUM_BLOCKS for block_id in chunk.block_ids)
    assert scheduler.num_free_blocks == scheduler.num_blocks - 12 == 36
    finish(scheduler)
    scheduler.check_conservation()
    assert scheduler.num_free_blocks == scheduler.num_blocks


def test_a_request_goes_where_its_prefix_is_cached() -> None:
    scheduler = make()
    scheduler.submit(request("other", 8, first=500, max_tokens=20), LOCAL, 0)
    scheduler.submit(request("first", 20, max_tokens=1), LOCAL, 0)
    assert (shard_of(scheduler, "other"), shard_of(scheduler, "first")) == (0, 1)
    step(scheduler)
    scheduler.submit(request("busy", 4, first=700, max_tokens=20), LOCAL, 0)
    scheduler.submit(request("again", 20), LOCAL, 0)
    assert (shard_of(scheduler, "busy"), shard_of(scheduler, "again")) == (1, 1)
    step(scheduler)
    assert scheduler.num_prefix_hit_tokens == 16


def test_a_cached_prefix_does_not_make_a_request_wait_for_blocks() -> None:
    scheduler = make()
    scheduler.submit(request("first", 20, max_tokens=1), LOCAL, 0)
    finish(scheduler)
    again = block_hashes(range(28), BLOCK_SIZE)
    scheduler.reserve("large", 40, ())
    scheduler.reserve("again", 28, again)
    assert (shard_of(scheduler, "large"), shard_of(scheduler, "again")) == (0, 1)
    granted = scheduler.grant_reservations()
    assert [len(reservation.block_ids) for _, reservation in granted] == [10, 7]
    scheduler.abort("large")
    scheduler.abort("again")
    scheduler.reserve("again", 28, again)
    assert shard_of(scheduler, "again") == 0, "where its prefix is, with blocks free"


@pytest.mark.parametrize("is_reserved_first", [True, False])
def test_a_sequence_is_where_its_kv_was_reserved(is_reserved_first: bool) -> None:
    scheduler = make()
    scheduler.submit(request("busy", 8, first=500, max_tokens=20), LOCAL, 0)
    step(scheduler)
    hashes = block_hashes(range(10), BLOCK_SIZE)
    if is_reserved_first:
        scheduler.reserve("d", 10, hashes)
        scheduler.submit(request("d", 10), DECODE, 0)
    else:
        scheduler.submit(request("d", 10), DECODE, 0)
        scheduler.reserve("d", 10, hashes)
    ((name, reservation),) = scheduler.grant_reservations()
    assert name == "d"
    assert all(NUM_BLOCKS <= block_id < 2 * NUM_BLOCKS for block_id in reservation.block_ids)
    scheduler.commit_reservation("d", 7, 1)
    _, drawn = step(scheduler)
    assert set(drawn) == {"busy", "d"}
    assert scheduler.abort("d") == 3
    scheduler.check_conservation()


def test_unknown_ids_are_answered_as_one_scheduler_does() -> None:
    scheduler = make()
    assert scheduler.abort("x") == scheduler.release("x") == scheduler.cancel_reservation("x") == 0
    with pytest.raises(UnknownRequestError):
        scheduler.commit_reservation("x", 1, 0)


@settings(deadline=None)  # other tests share the cores
@given(st.integers(1, 4), st.randoms(use_true_random=False))
def test_no_block_is_lost_or_used_twice(num_shards: int, draw: random.Random) -> None:
    scheduler = make(num_shards, num_blocks=10)
    limits = scheduler.limits
    open_ids: list[str] = []
    for index in range(40):
        kind = draw.randrange(5)
        if kind < 2:
            length = draw.randrange(1, 25)
            mode = LOCAL if kind else PREFILL
            first = 100 * draw.randrange(3)
            scheduler.submit(request(f"r{index}", length, first=first), mode, 0)
            open_ids.append(f"r{index}")
        elif kind == 2:
            scheduler.reserve(f"d{index}", draw.randrange(1, 30), ())
            open_ids.append(f"d{index}")
            scheduler.grant_reservations()
        elif kind == 3 and open_ids:
            scheduler.abort(open_ids.pop(draw.randrange(len(open_ids))))
        else:
            plan, _ = step(scheduler)
            if plan.chunks:
                check_plan(plan, limits, BUDGET)
        scheduler.check_conservation()
    for name in open_ids:
        scheduler.abort(name)
    assert scheduler.num_free_blocks == scheduler.num_blocks == num_shards * 10


def test_a_plan_whose_sequence_lies_on_two_shards_is_refused() -> None:
    chunk = ScheduledChunk("r", 0, (1,) * 5, (15, 16), 5, is_drawing=True)
    with pytest.raises(ValueError, match="out of bounds"):
        check_plan(StepPlan((chunk,)), make().limits, BUDGET)


def test_the_bound_on_tokens_is_each_shards_own() -> None:
    limits = make().limits
    chunks = [ScheduledChunk("r", 0, (1,) * 20, tuple(range(b, b + 5)), 20, is_drawing=True)
              for b in (0, 16)]  # fmt: skip
    check_plan(StepPlan(tuple(chunks)), limits, BUDGET)
    with pytest.raises(ValueError, match="a plan has 40 tokens"):
        check_plan(StepPlan((chunks[0], chunks[0])), limits, BUDGET)
