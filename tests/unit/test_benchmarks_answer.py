import pytest

from benchmarks.load.answer import answer_from
from benchmarks.load.exchange import Exchange

USAGE = b'data: {"choices": [], "usage": {"completion_tokens": %d}}\n\n'


def exchange(
    *pieces: bytes,
    max_tokens: int = 2,
    status: int = 200,
    is_complete: bool = True,
    failure: str = "",
) -> Exchange:
    """Each piece arrives one second after the one before; the first at 1 s."""
    return Exchange(
        request=b"",
        max_tokens=max_tokens,
        status=status,
        arrivals=[(1.0 + index, piece) for index, piece in enumerate(pieces)],
        is_complete=is_complete,
        failure=failure,
    )


def chunk(text: str = "a", finish_reason: str = "null") -> bytes:
    return b'data: {"choices": [{"text": "%s", "finish_reason": %s}]}\n\n' % (
        text.encode(),
        finish_reason.encode(),
    )


def test_chunks_are_timed_by_the_piece_that_completes_them() -> None:
    head, tail = chunk()[:10], chunk()[10:]
    answer = answer_from(exchange(head, tail + chunk(), USAGE % 2, b"data: [DONE]\n\n"))
    assert answer.error == ""
    assert answer.chunk_times_s == (2.0, 2.0)
    assert answer.num_tokens == 2
    assert (answer.ttft_s, answer.latency_s) == (2.0, 4.0)
    assert answer.gaps_s == [(2.0, 0.0)]


def test_a_token_without_text_counts_and_a_bare_end_does_not() -> None:
    pieces = (chunk(""), chunk("b"), chunk("", '"length"'), USAGE % 2)
    assert answer_from(exchange(*pieces)).chunk_times_s == (1.0, 2.0)


def test_a_last_token_with_its_end_counts() -> None:
    pieces = (chunk(), chunk("b", '"length"'), USAGE % 2)
    assert answer_from(exchange(*pieces)).chunk_times_s == (1.0, 2.0)


def test_a_stopped_answer_counts_its_chunks() -> None:
    answer = answer_from(exchange(chunk(), chunk(), chunk(), max_tokens=99, is_complete=False))
    assert answer.error == ""
    assert answer.num_tokens == 3


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (exchange(b'{"error": "no"}', status=400), 'status 400: {"error": "no"}'),
        (exchange(chunk(), failure="connection lost"), "connection lost"),
        (exchange(chunk(), USAGE % 1), "1 tokens instead of 2"),
        (exchange(USAGE % 2), "no chunk with a token"),
        (exchange(b"data: {nonsense\n\n"), "unreadable event"),
        (exchange(chunk(), b'data: {"error": {"message": "late"}}\n\n'), "error event"),
    ],
    ids=["status", "lost", "short", "empty", "not json", "error event"],
)
def test_what_went_wrong_is_said(bad: Exchange, error: str) -> None:
    assert answer_from(bad).error.startswith(error)
