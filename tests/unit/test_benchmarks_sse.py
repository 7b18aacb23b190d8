from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.sse import SseParser

STREAM = (
    b": keep-alive\r\n\r\n"
    b'data: {"a": "\xc3\xa9"}\n\n'
    b"event: x\ndata:one\ndata: two\n\n"
    b"id: 7\n\n"
    b"data: crlf\r\n\r\n"
    b"data: [DONE]\n\n"
    b"data: cut off"
)
EVENTS = [b'{"a": "\xc3\xa9"}', b"one\ntwo", b"crlf", b"[DONE]"]


def fed(pieces: list[bytes]) -> list[bytes]:
    parser = SseParser()
    return [event for piece in pieces for event in parser.feed(piece)]


def test_events_are_the_same_wherever_the_stream_is_split() -> None:
    for cut in range(len(STREAM) + 1):
        assert fed([STREAM[:cut], STREAM[cut:]]) == EVENTS, cut


def test_events_are_the_same_byte_by_byte() -> None:
    assert fed([STREAM[index : index + 1] for index in range(len(STREAM))]) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_are_the_same_for_any_pieces(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    assert fed([STREAM[a:b] for a, b in pairwise(edges)]) == EVENTS


def test_an_event_is_given_by_the_bytes_that_complete_it() -> None:
    parser = SseParser()
    assert parser.feed(b"data: x\n") == []
    assert parser.feed(b"\n") == [b"x"]
