"""How the tokens of a step are dealt out to the ranks of the sequence axis."""

from hypothesis import given
from hypothesis import strategies as st

from engine.scheduling.sequence_split import (
    MIN_SHARE_TOKENS,
    mean_context_tokens,
    ring_spans,
    sequence_shares,
)
from engine.scheduling.step_plan import ScheduledChunk, StepPlan


def plan_of(*chunks: tuple[int, int, bool]) -> StepPlan:
    """Chunks of (first position, tokens, is drawing)."""
    return StepPlan(
        tuple(
            ScheduledChunk(str(index), first, tuple(range(size)), (0,), first + size, drawing)
            for index, (first, size, drawing) in enumerate(chunks)
        )
    )


CHUNKS = st.tuples(st.integers(0, 300), st.integers(1, 400), st.booleans())


@given(st.lists(CHUNKS, min_size=1, max_size=6), st.integers(1, 8))
def test_every_token_is_computed_once_and_drawn_where_it_was(
    chunks: list[tuple[int, int, bool]], num_ranks: int
) -> None:
    plan = plan_of(*chunks)
    shares = sequence_shares(plan, num_ranks)
    if shares is None:
        shortest = num_ranks * MIN_SHARE_TOKENS
        assert num_ranks == 1 or all(size < shortest for _, size, _ in chunks)
        return
    assert len(shares) == num_ranks
    assert min(share.num_tokens for share in shares) > 0
    places = [
        (piece.request_id, piece.first_position + index, token)
        for share in shares
        for piece in share.chunks
        for index, token in enumerate(piece.token_ids)
    ]
    assert sorted(places) == sorted(
        (chunk.request_id, chunk.first_position + index, token)
        for chunk in plan.chunks
        for index, token in enumerate(chunk.token_ids)
    )
    drawing = [piece.request_id for piece in shares[0].chunks if piece.is_drawing]
    assert drawing == [chunk.request_id for chunk in plan.chunks if chunk.is_drawing]
    assert not any(piece.is_drawing for share in shares[1:] for piece in share.chunks)


@given(st.integers(0, 5000), st.integers(200, 4000), st.integers(2, 8))
def test_ranks_attend_to_as_many_positions(first: int, size: int, num_ranks: int) -> None:
    shares = sequence_shares(plan_of((first, size, True)), num_ranks)
    assert shares is not None
    work = [
        sum(
            piece.first_position + index + 1
            for piece in share.chunks
            for index in range(len(piece.token_ids))
        )
        for share in shares
    ]
    assert max(work) - min(work) <= 4 * (first + size)
    assert max(share.num_tokens for share in shares) - min(
        share.num_tokens for share in shares
    ) <= 2  # fmt: skip


@given(st.lists(CHUNKS, min_size=1, max_size=4), st.integers(2, 5))
def test_what_comes_round_the_ring_is_each_chunks_context_once(
    chunks: list[tuple[int, int, bool]], num_ranks: int
) -> None:
    """And of another rank nothing but what that rank computes in this step."""
    shares = sequence_shares(plan_of(*chunks), num_ranks)
    if shares is None:
        return
    for rank, share in enumerate(shares):
        spans = ring_spans(shares, rank)
        assert len(spans) == num_ranks
        for index, chunk in enumerate(share.chunks):
            seen = [position for source in spans for span in source[index] for position in span]
            assert sorted(seen) == list(range(chunk.first_position + len(chunk.token_ids)))
            for source, by_chunk in enumerate(spans):
                assert list(by_chunk[index]) == sorted(by_chunk[index], key=lambda span: span.start)
                if source == rank:
                    continue
                computed = {
                    piece.first_position + offset
                    for piece in shares[source].chunks
                    if piece.request_id == chunk.request_id
                    for offset in range(len(piece.token_ids))
                }
                assert {position for span in by_chunk[index] for position in span} <= computed


def test_the_mean_context_counts_every_token_with_what_stands_before_it() -> None:
    shares = sequence_shares(plan_of((100, 64, True), (0, 1, False)), 2)
    assert shares is not None
    assert mean_context_tokens(shares) == (sum(range(101, 165)) + 1) // 65
