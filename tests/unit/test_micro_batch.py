"""Cutting a step's plan: nothing is lost, nothing drawn twice, and the number that ends soonest."""

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.micro_batch import (
    best_num_micro_batches,
    bubble_share,
    cut_into_micro_batches,
    num_pass_times,
    pass_order,
)
from engine.scheduling.step_plan import ScheduledChunk, StepPlan

chunk_shapes = st.lists(
    st.tuples(st.integers(1, 40), st.integers(0, 50), st.booleans()), min_size=1, max_size=12
)


def plan_of(shapes: list[tuple[int, int, bool]]) -> StepPlan:
    chunks = []
    for index, (length, first, is_drawing) in enumerate(shapes):
        tokens = tuple(range(1000 * index, 1000 * index + length))
        blocks = tuple(range((first + length) // 16 + 1))
        chunks.append(
            ScheduledChunk(f"r{index}", first, tokens, blocks, first + length, is_drawing)
        )
    return StepPlan(tuple(chunks))


@given(chunk_shapes, st.integers(1, 20))
def test_micro_batches_in_order_are_the_plan(shapes: list[tuple[int, int, bool]], num: int) -> None:
    plan = plan_of(shapes)
    batches = cut_into_micro_batches(plan, num)
    assert len(batches) == min(num, plan.num_tokens)
    sizes = [batch.num_tokens for batch in batches]
    assert max(sizes) - min(sizes) <= 1
    parts = [chunk for batch in batches for chunk in batch.chunks]
    by_request: dict[str, list[ScheduledChunk]] = {}
    for part in parts:
        by_request.setdefault(part.request_id, []).append(part)
    for chunk in plan.chunks:
        pieces = by_request[chunk.request_id]
        assert tuple(token for piece in pieces for token in piece.token_ids) == chunk.token_ids
        position = chunk.first_position
        for piece in pieces:
            assert piece.first_position == position
            position += len(piece.token_ids)
            assert (piece.block_ids, piece.num_prompt_tokens) == (
                chunk.block_ids,
                chunk.num_prompt_tokens,
            )
        assert [piece.is_drawing for piece in pieces] == [False] * (len(pieces) - 1) + [
            chunk.is_drawing
        ]
    drawing = [part.request_id for part in parts if part.is_drawing]
    assert drawing == [chunk.request_id for chunk in plan.chunks if chunk.is_drawing]


def simulated_pass_times(num_micro_batches: int, num_stages: int, num_ranges: int) -> int:
    """End of a step in which each stage computes in `pass_order`, a pass a unit of time."""
    order = list(pass_order(num_micro_batches, num_stages, num_ranges))
    done: dict[tuple[int, int, int], int] = {}
    free = [0] * num_stages
    for _ in range(len(order) * num_stages):
        for stage in range(num_stages):
            for micro_batch, index in order:
                if (stage, micro_batch, index) in done:
                    continue
                before = (stage - 1, micro_batch, index)
                if stage == 0:
                    before = (num_stages - 1, micro_batch, index - 1)
                if before in done or (stage, index) == (0, 0):
                    free[stage] = max(free[stage], done.get(before, 0)) + 1
                    done[stage, micro_batch, index] = free[stage]
                break
    assert len(done) == len(order) * num_stages
    return max(done.values())


@given(st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_a_step_takes_as_many_pass_times_as_said(
    num_micro_batches: int, num_stages: int, num_ranges: int
) -> None:
    order = list(pass_order(num_micro_batches, num_stages, num_ranges))
    assert len(set(order)) == len(order) == num_micro_batches * num_ranges
    found = simulated_pass_times(num_micro_batches, num_stages, num_ranges)
    assert found == num_pass_times(num_micro_batches, num_stages, num_ranges)


def test_the_bubble_is_that_of_the_formula() -> None:
    assert bubble_share(4, 2) == 1 / 5
    assert bubble_share(4, 2, 2) == 1 / 9
    assert bubble_share(1, 2) == bubble_share(1, 2, 4) == 1 / 2
    assert bubble_share(7, 1) == 0


@given(st.integers(1, 600), st.integers(1, 8), st.integers(1, 4), st.integers(1, 100))
def test_the_best_number_of_micro_batches_is_the_best(
    num_tokens: int, num_stages: int, num_ranges: int, overhead_tokens: int
) -> None:
    best = best_num_micro_batches(
        num_tokens, num_stages, num_ranges, overhead_tokens=overhead_tokens
    )
    assert 1 <= best <= num_tokens

    def cost(num: int) -> float:
        time = num_pass_times(num, num_stages, num_ranges)
        return time * (num_tokens / num + overhead_tokens)

    assert cost(best) <= min(cost(num) for num in range(1, num_tokens + 1)) * (1 + 1e-12)


def test_one_stage_cuts_nothing() -> None:
    assert best_num_micro_batches(512, 1, overhead_tokens=1) == 1


def test_a_small_decode_step_is_not_cut_and_a_prompt_is() -> None:
    assert best_num_micro_batches(8, 2, overhead_tokens=32) == 1
    assert best_num_micro_batches(512, 2, overhead_tokens=32) == 4
