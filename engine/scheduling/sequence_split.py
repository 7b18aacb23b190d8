"""Long chunks of a step, cut along their tokens for the ranks of the sequence axis."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, pairwise

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


def ring_spans(shares: Sequence[StepPlan], rank: int) -> tuple[tuple[tuple[range, ...], ...], ...]:
    """What each chunk of `rank`'s share attends to of each rank's tokens: by rank, by chunk.

    Positions, ascending. Of `rank` itself with all that earlier steps computed: together they are
    the chunk's context.
    """
    pieces = [[(chunk.request_id, _positions(chunk)) for chunk in share.chunks] for share in shares]
    first: dict[str, int] = {}
    for request_id, positions in chain(*pieces):
        first[request_id] = min(positions.start, first.get(request_id, positions.start))

    def seen(chunk: ScheduledChunk, source: int) -> tuple[range, ...]:
        request_id, end = chunk.request_id, _positions(chunk).stop
        spans = [span for of, span in pieces[source] if of == request_id and span.start < end]
        return _joined([range(first[request_id] if source == rank else 0), *spans])

    return tuple(
        tuple(seen(chunk, source) for chunk in shares[rank].chunks) for source in range(len(shares))
    )


def mean_context_tokens(shares: Sequence[StepPlan]) -> int:
    """How many positions a token of the step attends to, itself included, on average."""
    chunks = [_positions(chunk) for share in shares for chunk in share.chunks]
    num_seen = sum((span.start + span.stop + 1) * len(span) // 2 for span in chunks)
    return num_seen // sum(map(len, chunks))


def _positions(chunk: ScheduledChunk) -> range:
    return range(chunk.first_position, chunk.first_position + len(chunk.token_ids))


def _joined(spans: Iterable[range]) -> tuple[range, ...]:
    """In order, neighbours as one, without empty ones."""
    joined: list[range] = []
    for span in sorted(filter(None, spans), key=lambda span: span.start):
        if joined and joined[-1].stop == span.start:
            joined[-1] = range(joined[-1].start, span.stop)
        else:
            joined.append(span)
    return tuple(joined)


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
