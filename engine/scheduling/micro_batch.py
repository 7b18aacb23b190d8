"""Cuts a step's plan into micro-batches that pipeline stages compute at the same time.

With `s` stages and `m` equal micro-batches a step takes m + s - 1 stage times, of which each stage
computes in m: the others, (s - 1) / (m + s - 1) of the step, are the bubble.

With `v` layer ranges on each stage (interleaved) a micro-batch goes round v times; a pass over one
range takes 1 / v of a stage time, and while m is a multiple of s the bubble is
(s - 1) / (v m + s - 1).

Source: GPipe (Huang et al., 2019), section 2.3; interleaved stages: Narayanan et al., 2021
(Megatron-LM), section 2.2.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from engine.scheduling.step_plan import ScheduledChunk, StepPlan


def num_pass_times(num_micro_batches: int, num_stages: int, num_ranges: int = 1) -> int:
    """Times of one pass over a range from the first stage's start to the last stage's end."""
    missing = -num_micro_batches % num_stages  # to a full group, see `pass_order`
    return num_ranges * num_micro_batches + num_stages - 1 + (num_ranges - 1) * missing


def bubble_share(num_micro_batches: int, num_stages: int, num_ranges: int = 1) -> float:
    """Of a step's time on all stages: waiting for each other, where micro-batches are alike."""
    total = num_pass_times(num_micro_batches, num_stages, num_ranges)
    return (total - num_ranges * num_micro_batches) / total


def pass_order(
    num_micro_batches: int, num_stages: int, num_ranges: int = 1
) -> Iterator[tuple[int, int]]:
    """In which order every stage computes: groups of as many micro-batches as stages go round.

    So when the last stage has computed a range for the first of a group, the first stage is done
    with all of the group.

    Yields:
        Micro-batch, range.
    """
    for first in range(0, num_micro_batches, num_stages):
        group = range(first, min(first + num_stages, num_micro_batches))
        for index in range(num_ranges):
            for micro_batch in group:
                yield micro_batch, index


@lru_cache(maxsize=4096)
def best_num_micro_batches(
    num_tokens: int, num_stages: int, num_ranges: int = 1, *, overhead_tokens: int
) -> int:
    """How many micro-batches end a step of `num_tokens` tokens soonest.

    A stage takes as long for a micro-batch as for its tokens and `overhead_tokens` more, which
    stand for one pass over the weights. With one range that is least near
    m = sqrt((s - 1) * num_tokens / overhead_tokens).
    """
    if num_stages == 1:
        return 1

    def cost(num: int) -> float:
        return num_pass_times(num, num_stages, num_ranges) * (num_tokens / num + overhead_tokens)

    return min(range(1, num_tokens + 1), key=cost)


def cut_into_micro_batches(plan: StepPlan, num: int) -> tuple[StepPlan, ...]:
    """Split the packed tokens of `plan` into at most `num` runs, alike in length up to one token.

    A chunk on a border becomes two, of which the first draws nothing: micro-batches that are
    computed in order leave the same KV as the whole plan, and draw for the same chunks in order.
    """
    assert num >= 1, num
    num_tokens = plan.num_tokens
    num = min(num, num_tokens)
    if num <= 1:
        return (plan,)
    left = [num_tokens // num + (index < num_tokens % num) for index in range(num)]
    batches: list[list[ScheduledChunk]] = [[] for _ in left]
    index = 0
    for chunk in plan.chunks:
        start, end = 0, len(chunk.token_ids)
        while start < end:
            if left[index] == 0:
                index += 1
            taken = min(left[index], end - start)
            left[index] -= taken
            batches[index].append(_part(chunk, start, start + taken))
            start += taken
    return tuple(StepPlan(tuple(chunks)) for chunks in batches)


def _part(chunk: ScheduledChunk, start: int, end: int) -> ScheduledChunk:
    """Tokens [start, end) of a chunk."""
    if start == 0 and end == len(chunk.token_ids):
        return chunk
    return replace(
        chunk,
        first_position=chunk.first_position + start,
        token_ids=chunk.token_ids[start:end],
        is_drawing=chunk.is_drawing and end == len(chunk.token_ids),
    )
