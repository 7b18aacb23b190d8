"""The scheduler as bookkeeping: budgets, order, preemption, reservations, conservation."""

import dataclasses
import random
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import (
    CapacityError,
    DuplicateRequestError,
    InvalidRequestError,
    LayoutMismatchError,
    UnknownRequestError,
)
from engine.request import FinishReason, Request, SamplingParams
from engine.runtime.commands import (
    ErrorEvent,
    KvComputedEvent,
    PreemptedEvent,
    Reservation,
    SequenceMode,
    TokenEvent,
)
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_plan import DrawnToken, StepPlan
from tests.fakes.engine import expected_tokens, next_token

LOCAL, PREFILL, DECODE = SequenceMode.LOCAL, SequenceMode.PREFILL, SequenceMode.DECODE


def make_scheduler(*, num_blocks=64, max_num_sequences=8, block_size=4, **changes) -> Scheduler:
    limits = EngineLimits(
        vocab_size=1000, max_context_tokens=200, num_blocks=num_blocks, block_size_tokens=block_size
    )
    return Scheduler(
        limits, max_num_sequences=max_num_sequences, eos_token_ids=frozenset(), **changes
    )


def make_request(request_id="a", *, num_prompt=10, first=0, max_tokens=5, **sampling) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=tuple(range(first, first + num_prompt)),
        sampling=SamplingParams(max_tokens=max_tokens, **sampling),
    )


class Driver:
    """Steps a scheduler with the fake model and checks every plan."""

    def __init__(self, scheduler: Scheduler, *, budget: int = 16) -> None:
        self.scheduler = scheduler
        self.budget = budget
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.announced: dict[str, list[tuple[int, int]]] = {}
        self.preempted: list[str] = []
        self.granted: dict[str, Reservation] = {}
        self.plans: deque[tuple[StepPlan, set[int]]] = deque()
        self.now_ns = 0

    def submit(self, request: Request, mode: SequenceMode) -> None:
        self.scheduler.limits.check_request(request, mode)
        self.book(self.scheduler.submit(request, mode, self.now_ns))

    def step(self) -> int:
        """Plan as much as may be in flight, commit the earliest; returns its number of tokens."""
        while len(self.plans) < self.scheduler.max_num_plans and self.begin():
            pass
        return self.finish() if self.plans else 0

    def begin(self) -> int:
        """Plan; returns the number of tokens."""
        self.now_ns += 1
        plan, granted = self.scheduler.schedule(self.budget, self.now_ns)
        self.granted.update(dict(granted))
        assert plan.num_tokens <= self.budget
        assert len(plan.chunks) <= self.scheduler.max_num_sequences
        assert len({chunk.request_id for chunk in plan.chunks}) == len(plan.chunks)
        block_size = self.scheduler.limits.block_size_tokens
        in_flight = set().union(*(blocks for _, blocks in self.plans))
        written: set[int] = set()
        for chunk in plan.chunks:
            sequence = self.scheduler.sequence(chunk.request_id)
            end = chunk.first_position + len(chunk.token_ids)
            assert list(chunk.token_ids) == sequence.token_ids[chunk.first_position : end]
            assert end == sequence.num_planned_tokens
            assert end <= len(chunk.block_ids) * block_size
            blocks = set(
                chunk.block_ids[chunk.first_position // block_size : -(-end // block_size)]
            )
            assert not blocks & (written | in_flight), "two chunks write to one block"
            written |= blocks
            assert chunk.is_drawing == (end == sequence.num_tokens)
        if plan.chunks:
            self.plans.append((plan, written))
        self.scheduler.check_conservation()
        return plan.num_tokens

    def finish(self) -> int:
        """Commit the earliest plan; returns its number of tokens."""
        plan, _ = self.plans.popleft()
        drawn = []
        for chunk in plan.chunks:
            sequence = self.scheduler.sequence(chunk.request_id)
            assert sequence.block_ids[: len(chunk.block_ids)] == list(chunk.block_ids)
            assert chunk.first_position == sequence.num_computed_tokens
            if chunk.is_drawing:
                drawn.append(DrawnToken(next_token(sequence.token_ids), None))
        self.book(self.scheduler.commit(plan, drawn, self.now_ns))
        self.scheduler.check_conservation()
        return plan.num_tokens

    def land(self, request_id: str) -> None:
        """Commit until no plan has tokens of it: only then it may be ended."""
        while self.scheduler.is_in_flight(request_id):
            self.finish()

    def book(self, events) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self.tokens.setdefault(event.request_id, []).append(event.token_id)
                if event.finish_reason is not None:
                    self.finished[event.request_id] = event.finish_reason
            elif isinstance(event, KvComputedEvent):
                span = (event.first_token, event.num_tokens)
                self.announced.setdefault(event.request_id, []).append(span)
            elif isinstance(event, PreemptedEvent):
                self.preempted.append(event.request_id)
            else:
                raise event.error

    def run(self, *, max_steps: int = 2000) -> None:
        """Step until nothing can run."""
        for _ in range(max_steps):
            if not self.step():
                return
        raise AssertionError("no end in sight")


def test_sequences_that_decode_are_dealt_out_to_the_plans_in_flight():
    driver = Driver(make_scheduler(max_num_plans=2))
    for index in range(5):
        driver.submit(make_request(str(index), num_prompt=2, first=index, max_tokens=9), LOCAL)
    driver.step()
    driver.begin()
    for _ in range(5):
        assert driver.begin() > 0
        assert sorted(len(plan.chunks) for plan, _ in driver.plans) == [2, 3]
        driver.finish()
    driver.run()
    for index in range(5):
        assert driver.tokens[str(index)] == expected_tokens((index, index + 1), 9)


def test_chunks_of_one_prompt_follow_each_other_in_flight():
    driver = Driver(make_scheduler(max_num_plans=3), budget=16)
    driver.submit(make_request(num_prompt=40), PREFILL)
    assert [driver.begin() for _ in range(4)] == [16, 16, 8, 0]
    assert driver.tokens == {}, "its first token waits for the third plan"
    assert [driver.finish() for _ in range(3)] == [16, 16, 8]
    assert driver.announced["a"] == [(0, 16), (16, 16), (32, 8)]
    assert driver.tokens["a"] == expected_tokens(range(40), 1)


def test_what_is_in_flight_is_not_preempted():
    driver = Driver(make_scheduler(num_blocks=5, max_num_plans=2, has_prefix_cache=False))
    for index in range(2):
        driver.submit(make_request(str(index), num_prompt=6, first=index, max_tokens=8), LOCAL)
    while not driver.scheduler.num_preemptions:
        in_flight = {chunk.request_id for plan, _ in driver.plans for chunk in plan.chunks}
        while len(driver.plans) < 2 and driver.begin():
            pass
        assert all(driver.scheduler.sequence(name).block_ids for name in in_flight)
        driver.finish()
    driver.run()
    for index in range(2):
        assert driver.tokens[str(index)] == expected_tokens(range(index, index + 6), 8)


def test_a_sequence_in_flight_cannot_end():
    driver = Driver(make_scheduler(max_num_plans=2))
    driver.submit(make_request(), LOCAL)
    driver.begin()
    with pytest.raises(AssertionError, match="being computed"):
        driver.scheduler.abort("a")


def test_local_request_runs_to_its_length():
    driver = Driver(make_scheduler())
    driver.submit(make_request(), LOCAL)
    driver.run()
    assert driver.tokens["a"] == expected_tokens(range(10), 5)
    assert driver.finished["a"] is FinishReason.LENGTH
    assert driver.scheduler.block_pool.num_free == 64


def test_stop_token_ends_the_answer_unless_it_comes_before_min_tokens():
    answer = expected_tokens(range(10), 5)
    driver = Driver(make_scheduler())
    stop = frozenset({answer[1]})
    driver.submit(make_request("a", stop_token_ids=stop), LOCAL)
    driver.submit(make_request("b", stop_token_ids=stop, min_tokens=2), LOCAL)
    driver.run()
    assert driver.tokens["a"] == answer[:2]
    assert driver.finished["a"] is FinishReason.STOP
    assert driver.tokens["b"] == answer


@pytest.mark.parametrize("ignore_eos", [True, False])
def test_model_end_token_ends_the_answer_unless_ignored(ignore_eos):
    answer = expected_tokens(range(10), 5)
    scheduler = make_scheduler()
    scheduler.eos_token_ids = frozenset({answer[2]})
    driver = Driver(scheduler)
    driver.submit(make_request(ignore_eos=ignore_eos), LOCAL)
    driver.run()
    assert driver.tokens["a"] == (answer if ignore_eos else answer[:3])


def test_earlier_outputs_count_against_max_tokens():
    answer = expected_tokens(range(10), 5)
    driver = Driver(make_scheduler())
    request = dataclasses.replace(make_request(), output_token_ids=tuple(answer[:3]))
    driver.submit(request, LOCAL)
    driver.run()
    assert driver.tokens["a"] == answer[3:]


def test_long_prompt_is_computed_in_chunks_that_end_on_block_borders():
    scheduler = make_scheduler()
    scheduler.submit(make_request(num_prompt=50), LOCAL, 0)
    ends = []
    for _ in range(3):
        plan, _ = scheduler.schedule(18, 0)
        (chunk,) = plan.chunks
        ends.append(chunk.first_position + len(chunk.token_ids))
        scheduler.commit(plan, [DrawnToken(1, None)] if chunk.is_drawing else [], 0)
    assert ends == [16, 32, 50]


def test_decoding_comes_before_prefill_in_every_step():
    driver = Driver(make_scheduler(), budget=12)
    driver.submit(make_request("a", num_prompt=4, max_tokens=20), LOCAL)
    driver.step()
    driver.submit(make_request("b", num_prompt=60, first=100), LOCAL)
    plan, _ = driver.scheduler.schedule(12, 0)
    assert [(chunk.request_id, len(chunk.token_ids)) for chunk in plan.chunks] == [
        ("a", 1),
        ("b", 8),
    ]


def test_second_request_with_the_same_prefix_computes_only_the_rest():
    driver = Driver(make_scheduler())
    driver.submit(make_request("a", num_prompt=30), LOCAL)
    driver.run()
    before = driver.scheduler.num_prefill_tokens
    driver.submit(make_request("b", num_prompt=30), LOCAL)
    driver.run()
    assert driver.tokens["a"] == driver.tokens["b"]
    assert driver.scheduler.num_prefill_tokens - before == 2
    assert driver.scheduler.num_prefix_hit_tokens == 28


def test_wholly_cached_prompt_still_computes_its_last_token():
    driver = Driver(make_scheduler())
    for request_id in ("a", "b"):
        driver.submit(make_request(request_id, num_prompt=32), LOCAL)
        driver.run()
    assert driver.scheduler.num_prefix_hit_tokens == 28
    assert driver.tokens["a"] == driver.tokens["b"]


def test_answers_are_cached_for_the_next_turn():
    driver = Driver(make_scheduler())
    driver.submit(make_request("a", num_prompt=10, max_tokens=11), LOCAL)
    driver.run()
    turn = dataclasses.replace(
        make_request("b"), prompt_token_ids=(*range(10), *driver.tokens["a"], 5)
    )
    driver.submit(turn, LOCAL)
    driver.run()
    assert driver.scheduler.num_prefix_hit_tokens == 20


def test_without_a_prefix_cache_nothing_is_reused():
    driver = Driver(make_scheduler(has_prefix_cache=False))
    for request_id in ("a", "b"):
        driver.submit(make_request(request_id, num_prompt=30), LOCAL)
        driver.run()
    assert driver.scheduler.num_prefix_hit_tokens == 0
    assert driver.scheduler.num_prefill_tokens == 60


def test_salted_prompts_share_nothing():
    driver = Driver(make_scheduler(hash_salt_of=lambda num_prompt: num_prompt))
    driver.submit(make_request("a", num_prompt=30), LOCAL)
    driver.run()
    driver.submit(make_request("b", num_prompt=31), LOCAL)
    driver.run()
    assert driver.scheduler.num_prefix_hit_tokens == 0


def test_preempted_sequences_draw_the_same_tokens():
    driver = Driver(make_scheduler(num_blocks=12))
    for index in range(4):
        driver.submit(
            make_request(str(index), num_prompt=8, first=100 * index, max_tokens=25), LOCAL
        )
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    for index in range(4):
        assert driver.tokens[str(index)] == expected_tokens(range(100 * index, 100 * index + 8), 25)


def test_prefill_announces_each_token_once_and_holds_its_blocks():
    driver = Driver(make_scheduler(), budget=20)
    driver.submit(make_request("a", num_prompt=41), PREFILL)
    driver.run()
    assert driver.tokens["a"] == expected_tokens(range(41), 1)
    assert driver.announced["a"] == [(0, 20), (20, 20), (40, 1)]
    assert driver.scheduler.block_pool.num_free == 64 - 11
    assert driver.scheduler.release("a") == 11
    assert driver.scheduler.release("a") == 0


def test_prefill_announces_cached_tokens_too():
    driver = Driver(make_scheduler(), budget=20)
    driver.submit(make_request("a", num_prompt=30), LOCAL)
    driver.run()
    driver.submit(make_request("b", num_prompt=41), PREFILL)
    driver.run()
    assert driver.announced["b"] == [(0, 41)]


def test_prefill_holds_its_blocks_even_when_the_first_token_ends_the_answer():
    driver = Driver(make_scheduler())
    driver.submit(make_request("a", max_tokens=1), PREFILL)
    driver.run()
    assert driver.finished["a"] is FinishReason.LENGTH
    assert driver.scheduler.release("a") == 3


def test_prefill_sequences_are_never_preempted():
    driver = Driver(make_scheduler(num_blocks=27), budget=12)
    driver.submit(make_request("local", num_prompt=4, max_tokens=30), LOCAL)
    driver.step()
    driver.submit(make_request("prefill", num_prompt=96, first=500), PREFILL)
    driver.run()
    assert driver.scheduler.num_preemptions == 1
    assert driver.announced["prefill"][:2] == [(0, 8), (8, 8)]
    assert sum(length for _, length in driver.announced["prefill"]) == 96
    assert "local" not in driver.finished
    driver.scheduler.release("prefill")
    driver.run()
    assert driver.tokens["local"] == expected_tokens(range(4), 30)


@pytest.mark.parametrize("submit_first", [True, False])
def test_handed_over_sequence_decodes_without_prefill(submit_first):
    driver = Driver(make_scheduler())
    scheduler, request = driver.scheduler, make_request(num_prompt=10)
    if submit_first:
        driver.submit(request, DECODE)
        assert driver.step() == 0
    scheduler.reserve("a", 10, block_hashes(range(10), 4))
    ((request_id, reservation),) = scheduler.grant_reservations()
    assert (request_id, len(reservation.block_ids), reservation.num_cached_tokens) == ("a", 3, 0)
    scheduler.commit_reservation("a", expected_tokens(range(10), 1)[0], 7)
    if not submit_first:
        assert driver.step() == 0
        driver.submit(request, DECODE)
    driver.run()
    assert driver.tokens["a"] == expected_tokens(range(10), 5)[1:]
    assert scheduler.num_prefill_tokens == 0
    assert scheduler.num_decode_tokens == 4
    assert scheduler.block_pool.num_free == 64


def hand_over(driver: Driver, request: Request) -> int:
    """Reserve and commit for `request`; returns the cached tokens."""
    num_prompt = len(request.prompt_token_ids)
    driver.scheduler.reserve(
        request.request_id, num_prompt, block_hashes(request.prompt_token_ids, 4)
    )
    ((_, reservation),) = driver.scheduler.grant_reservations()
    first = expected_tokens(request.prompt_token_ids, 1)[0]
    driver.book(driver.scheduler.commit_reservation(request.request_id, first, driver.now_ns))
    return reservation.num_cached_tokens


def test_handed_over_prompt_is_a_prefix_hit_for_the_next_reservation():
    driver = Driver(make_scheduler())
    cached = []
    for request_id in ("a", "b"):
        request = make_request(request_id, num_prompt=12)
        driver.submit(request, DECODE)
        cached.append(hand_over(driver, request))
        driver.run()
    assert cached == [0, 12]
    assert driver.tokens["a"] == driver.tokens["b"]


def test_preempted_handover_is_computed_locally_and_says_so():
    driver = Driver(make_scheduler(num_blocks=9, has_prefix_cache=False))
    for request_id, first in (("a", 0), ("b", 100)):
        request = make_request(request_id, num_prompt=8, first=first, max_tokens=20)
        driver.submit(request, DECODE)
        hand_over(driver, request)
    driver.run()
    assert driver.scheduler.num_preemptions > 0
    assert driver.preempted == ["b"] * driver.scheduler.num_preemptions
    assert driver.scheduler.num_prefill_tokens > 0
    assert driver.tokens["b"] == expected_tokens(range(100, 108), 20)[1:]


def test_kv_of_other_tokens_is_refused():
    driver = Driver(make_scheduler())
    driver.scheduler.reserve("a", 12, block_hashes(range(50, 62), 4))
    driver.scheduler.grant_reservations()
    driver.scheduler.commit_reservation("a", 1, 0)
    (event,) = driver.scheduler.submit(make_request(num_prompt=12), DECODE, 0)
    assert isinstance(event, ErrorEvent)
    assert isinstance(event.error, LayoutMismatchError)
    assert driver.scheduler.block_pool.num_free == 64


def test_commit_without_a_granted_reservation_is_refused():
    scheduler = make_scheduler(num_blocks=4)
    with pytest.raises(UnknownRequestError):
        scheduler.commit_reservation("a", 1, 0)
    scheduler.reserve("a", 16, [])
    scheduler.reserve("b", 16, [])
    assert [request_id for request_id, _ in scheduler.grant_reservations()] == ["a"]
    with pytest.raises(UnknownRequestError):
        scheduler.commit_reservation("b", 1, 0)
    scheduler.commit_reservation("a", 1, 0)
    with pytest.raises(UnknownRequestError):
        scheduler.commit_reservation("a", 1, 0)


def test_reservations_wait_in_order_while_the_pool_is_full():
    scheduler = make_scheduler(num_blocks=8)
    for request_id, num_tokens in (("a", 32), ("b", 24), ("c", 4)):
        scheduler.reserve(request_id, num_tokens, [])
    assert [r for r, _ in scheduler.grant_reservations()] == ["a"]
    assert scheduler.grant_reservations() == []  # c would fit nowhere before b
    assert scheduler.cancel_reservation("a") == 8
    assert [r for r, _ in scheduler.grant_reservations()] == ["b", "c"]


def test_reservation_behind_a_waiting_sequence_does_not_overtake_it():
    driver = Driver(make_scheduler(num_blocks=8))
    driver.scheduler.reserve("first", 20, [])
    assert len(driver.scheduler.grant_reservations()) == 1
    driver.submit(make_request("local", num_prompt=24), LOCAL)
    driver.scheduler.reserve("second", 8, [])
    assert driver.step() == 0
    assert "second" not in driver.granted
    driver.scheduler.cancel_reservation("first")
    driver.run()
    assert driver.finished["local"]
    assert "second" in driver.granted


def test_committed_reservation_is_not_cancelled():
    scheduler = make_scheduler()
    scheduler.reserve("a", 8, [])
    scheduler.grant_reservations()
    scheduler.commit_reservation("a", 1, 0)
    assert scheduler.cancel_reservation("a") == 0
    assert scheduler.abort("a") == 2


def test_a_second_request_with_the_same_id_is_refused():
    scheduler = make_scheduler()
    scheduler.submit(make_request(), LOCAL, 0)
    with pytest.raises(DuplicateRequestError):
        scheduler.submit(make_request(), LOCAL, 0)
    scheduler.reserve("b", 8, [])
    with pytest.raises(DuplicateRequestError):
        scheduler.reserve("b", 8, [])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_prompt": 0}, "empty"),
        ({"num_prompt": 196}, "context"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"first": 995}, "vocabulary|token id"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"logit_bias": ((1000, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((1, float("inf")),)}, "logit_bias"),
        ({"num_top_logprobs": 21}, "num_top_logprobs"),
    ],
    ids=str,
)
def test_requests_that_can_never_run_are_refused(changes, match):
    with pytest.raises(InvalidRequestError, match=match):
        make_scheduler().limits.check_request(make_request(**changes), LOCAL)


def test_what_exceeds_the_pool_is_refused_at_once():
    limits = make_scheduler(num_blocks=4).limits
    limits.check_request(make_request(num_prompt=12, max_tokens=5), LOCAL)
    with pytest.raises(InvalidRequestError, match="KV pool"):
        limits.check_request(make_request(num_prompt=12, max_tokens=6), LOCAL)
    limits.check_request(make_request(num_prompt=16, max_tokens=100), PREFILL)
    with pytest.raises(CapacityError):
        limits.check_reservation(17)


def test_a_full_pool_is_reached_without_deadlock_by_the_longest_request():
    driver = Driver(make_scheduler(num_blocks=4))
    driver.submit(make_request(num_prompt=12, max_tokens=5), LOCAL)
    driver.run()
    assert driver.finished["a"] is FinishReason.LENGTH


operations = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "local",
                "local",
                "prefill",
                "decode",
                "reserve",
                "commit",
                "cancel",
                "abort",
                "release",
                "step",
                "step",
                "step",
            ]
        ),
        st.integers(0, 5),
        st.integers(1, 9),
        st.integers(1, 8),
    ),
    max_size=80,
)


@settings(max_examples=150, deadline=None)
@given(
    operations,
    st.integers(8, 20),
    st.integers(2, 5),
    st.booleans(),
    st.integers(0, 9),
    st.integers(1, 3),
)
def test_random_schedules_end_with_all_blocks_free(
    steps, num_blocks, max_num_sequences, has_prefix_cache, extra_budget, max_num_plans
):
    scheduler = make_scheduler(
        num_blocks=num_blocks,
        max_num_sequences=max_num_sequences,
        has_prefix_cache=has_prefix_cache,
        max_num_plans=max_num_plans,
    )
    driver = Driver(scheduler, budget=scheduler.min_num_batched_tokens + extra_budget)
    requests: dict[str, tuple[Request, SequenceMode]] = {}
    reserved: dict[str, tuple[int, ...]] = {}
    reservation_count = 0
    for operation, index, num_prompt, max_tokens in steps:
        request_id = f"r{index}"
        # Few distinct prompts, so that prefixes are shared.
        request = make_request(
            request_id, num_prompt=num_prompt, first=index % 2, max_tokens=max_tokens
        )
        if operation in {"local", "prefill", "decode"}:
            mode = SequenceMode(operation)
            if scheduler.has_sequence(request_id) or request_id in reserved:
                continue
            driver.submit(request, mode)
            requests[request_id] = (request, mode)
            driver.tokens.pop(request_id, None)
            driver.announced.pop(request_id, None)
            if mode is DECODE:
                reserved[request_id] = request.prompt_token_ids
                scheduler.reserve(request_id, num_prompt, block_hashes(request.prompt_token_ids, 4))
        elif operation == "reserve":
            reservation_count += 1
            scheduler.reserve(f"x{reservation_count}", num_prompt, [])
        elif (
            operation == "commit" and request_id in reserved and scheduler.has_sequence(request_id)
        ):
            driver.granted.update(dict(scheduler.grant_reservations()))
            if request_id in driver.granted:
                first = expected_tokens(reserved.pop(request_id), 1)[0]
                driver.granted.pop(request_id)
                driver.book(scheduler.commit_reservation(request_id, first, 0))
        elif operation == "cancel":
            scheduler.cancel_reservation(f"x{index}")
        elif operation == "abort":
            driver.land(request_id)
            scheduler.abort(request_id)
            reserved.pop(request_id, None)
            driver.granted.pop(request_id, None)
            requests.pop(request_id, None)
        elif operation == "release":
            driver.land(request_id)
            scheduler.release(request_id)
        else:
            driver.step()
        scheduler.check_conservation()
    for number in range(reservation_count + 1):
        scheduler.cancel_reservation(f"x{number}")
    for request_id in reserved:
        driver.land(request_id)
        scheduler.abort(request_id)
        requests.pop(request_id, None)
    for _ in range(50):  # PREFILL sequences hold blocks that others wait for
        driver.run()
        for request_id in requests:
            sequence_done = driver.tokens.get(request_id)
            if sequence_done and requests[request_id][1] is PREFILL:
                scheduler.release(request_id)
    for request_id, (request, mode) in requests.items():
        if request_id not in driver.tokens:
            continue  # released before it drew
        answer = expected_tokens(request.prompt_token_ids, request.sampling.max_tokens)
        if mode is LOCAL:
            assert driver.tokens[request_id] == answer
        elif mode is DECODE:
            assert driver.tokens[request_id] == answer[1:]
        else:
            assert driver.tokens[request_id] == answer[:1]
            spans = driver.announced[request_id]
            assert [start for start, _ in spans] == [
                sum(length for _, length in spans[:i]) for i in range(len(spans))
            ]
            assert sum(length for _, length in spans) == len(request.prompt_token_ids)
    for request_id in requests:
        scheduler.abort(request_id)
    scheduler.check_conservation()
    assert scheduler.num_sequences == len(scheduler.reservations) == 0
    assert scheduler.block_pool.num_free == num_blocks


def test_many_random_sequences_all_make_progress():
    rng = random.Random(0)
    driver = Driver(make_scheduler(num_blocks=30, max_num_sequences=6), budget=24)
    expected = {}
    for index in range(60):
        request = make_request(
            str(index),
            num_prompt=rng.randrange(1, 60),
            first=rng.randrange(3),
            max_tokens=rng.randrange(1, 40),
        )
        expected[str(index)] = expected_tokens(
            request.prompt_token_ids, request.sampling.max_tokens
        )
        driver.submit(request, LOCAL)
        if index % 3 == 0:
            driver.step()
    driver.run()
    assert driver.tokens == expected


# Prefixes that others read or write.


def hashes_of(num_blocks: int, *, first: int = 0) -> list[bytes]:
    return block_hashes(range(first, first + 4 * num_blocks), 4)


def test_ended_sequence_tells_the_hashes_of_its_full_blocks():
    driver = Driver(make_scheduler())
    driver.submit(make_request(num_prompt=10, max_tokens=4), LOCAL)
    driver.run()
    token_ids = [*range(10), *driver.tokens["a"]]
    # The last token was drawn but its KV never computed.
    assert driver.scheduler.take_ended_prefixes() == [tuple(block_hashes(token_ids[:13], 4))]
    assert driver.scheduler.take_ended_prefixes() == []


def test_held_prefix_outlives_every_other_use_of_the_pool():
    driver = Driver(make_scheduler(num_blocks=8))
    driver.submit(make_request(num_prompt=9, max_tokens=1), LOCAL)
    driver.run()
    hold = driver.scheduler.hold_prefix("h", hashes_of(4))
    assert len(hold.block_ids) == 2
    assert hold.num_cached_tokens == 8
    driver.submit(make_request("b", num_prompt=24, first=100, max_tokens=1), LOCAL)
    driver.run()
    assert driver.finished["b"] is FinishReason.LENGTH
    assert driver.scheduler.block_pool.cached_prefix(hashes_of(2)) == list(hold.block_ids)
    assert driver.scheduler.cancel_reservation("h") == 2
    driver.scheduler.check_conservation()
    assert driver.scheduler.block_pool.num_free == 8


def test_taken_prefix_is_found_by_the_next_sequence_as_far_as_it_was_written():
    driver = Driver(make_scheduler(num_blocks=8))
    taken = driver.scheduler.take_prefix("t", hashes_of(4))
    assert (len(taken.block_ids), taken.num_cached_tokens) == (4, 0)
    assert driver.scheduler.block_pool.cached_prefix(hashes_of(4)) == [], "nothing is written yet"
    driver.scheduler.adopt_prefix("t", 3)
    driver.scheduler.check_conservation()
    assert driver.scheduler.block_pool.num_free == 8
    driver.submit(make_request(num_prompt=17, max_tokens=1), LOCAL)
    driver.run()
    assert driver.scheduler.num_prefix_hit_tokens == 12
    assert driver.scheduler.num_prefill_tokens == 5


def test_prefix_that_was_given_back_cannot_be_adopted():
    scheduler = make_scheduler()
    scheduler.take_prefix("t", hashes_of(2))
    assert scheduler.cancel_reservation("t") == 2
    with pytest.raises(UnknownRequestError, match="t"):
        scheduler.adopt_prefix("t", 2)
    assert scheduler.block_pool.cached_prefix(hashes_of(2)) == []


def test_prefix_takes_no_block_that_a_decoding_sequence_may_need_next():
    driver = Driver(make_scheduler(num_blocks=4))
    driver.submit(make_request(num_prompt=8, max_tokens=9), LOCAL)
    driver.step()
    with pytest.raises(CapacityError, match="2 free"):
        driver.scheduler.take_prefix("t", hashes_of(2, first=500))
    taken = driver.scheduler.take_prefix("t", hashes_of(1, first=500))
    with pytest.raises(DuplicateRequestError):
        driver.scheduler.hold_prefix("t", hashes_of(1))
    assert len(taken.block_ids) == 1
    driver.scheduler.check_conservation()
