"""Cuts a step's plan into micro-batches that pipeline stages compute at the same time.

With `s` stages and `m` equal micro-batches a step takes m + s - 1 stage times, of which each stage
computes in m: the others, (s - 1) / (m + s - 1) of the step, are the bubble.

Source: GPipe (Huang et al., 2019), section 2.3.
"""

import math
from dataclasses import replace

from engine.scheduling.step_plan import ScheduledChunk, StepPlan


def best_num_micro_batches(num_tokens: int, num_stages: int, *, overhead_tokens: int) -> int:
    """How many micro-batches end a step of `num_tokens` tokens soonest.

    A stage takes as long for a micro-batch as for its tokens and `overhead_tokens` more, which
    stand for one pass over the weights. So m micro-batches take
    (m + s - 1) * (num_tokens / m + overhead_tokens), least at
    m = sqrt((s - 1) * num_tokens / overhead_tokens).
    """
    if num_stages == 1 or num_tokens <= 1:
        return 1

    def cost(num: int) -> float:
        return (num + num_stages - 1) * (num_tokens / num + overhead_tokens)

    near = math.sqrt((num_stages - 1) * num_tokens / overhead_tokens)
    low = min(max(1, math.floor(near)), num_tokens)
    return min((low, min(low + 1, num_tokens)), key=cost)


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
