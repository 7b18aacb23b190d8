"""Long chunks of a step, cut along their tokens for the ranks of the sequence axis."""

from dataclasses import replace
from itertools import pairwise

from engine.scheduling.step_plan import ScheduledChunk, StepPlan

MIN_SHARE_TOKENS = 16
"""Shorter shares of a chunk cost more in exchange than they save."""


def sequence_shares(plan: StepPlan, num_ranks: int) -> tuple[StepPlan, ...] | None:
    """Each rank's part of a plan; None where every rank had better compute all of it.

    A chunk is cut into twice as many pieces as there are ranks; rank r computes the r-th from the
    front and the r-th from the end. A token costs attention as many positions as stand before it,
    so that ranks have the same work under the causal triangle ("zigzag"). Short chunks stay whole,
    on rank 0, which has the last token of every chunk: it alone draws.
    """
    shortest = num_ranks * MIN_SHARE_TOKENS
    if num_ranks == 1 or all(len(chunk.token_ids) < shortest for chunk in plan.chunks):
        return None
    shares: list[list[ScheduledChunk]] = [[] for _ in range(num_ranks)]
    for chunk in plan.chunks:
        if len(chunk.token_ids) < shortest:
            shares[0].append(chunk)
            continue
        pieces = _pieces(chunk, 2 * num_ranks)
        for rank in range(num_ranks):
            shares[rank] += (pieces[rank], pieces[-1 - rank])
    return tuple(StepPlan(tuple(share)) for share in shares)


def _pieces(chunk: ScheduledChunk, num_pieces: int) -> list[ScheduledChunk]:
    num_tokens = len(chunk.token_ids)
    cuts = [index * num_tokens // num_pieces for index in range(num_pieces + 1)]
    return [
        replace(
            chunk,
            first_position=chunk.first_position + start,
            token_ids=chunk.token_ids[start:stop],
            is_drawing=chunk.is_drawing and stop == num_tokens,
        )
        for start, stop in pairwise(cuts)
    ]
