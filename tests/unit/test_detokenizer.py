import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.detokenizer import Detokenizer, StopCutter
from tests.fakes.byte_tokenizer import byte_tokenizer
from tests.fakes.workers import END_TOKEN_ID

TOKEN_BYTES = byte_tokenizer().token_bytes

few_letters = st.text(alphabet="ab\u00e9\U0001f600", max_size=24)
stops_lists = st.lists(st.text(alphabet="ab\u00e9", min_size=1, max_size=4), max_size=4)


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The definition: the first stop string to complete ends the text; the longest of a tie."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], True
    return text, False


def split(items, cuts):
    bounds = sorted({min(c, len(items)) for c in cuts} | {0, len(items)})
    return [items[a:b] for a, b in itertools.pairwise(bounds)]


@given(few_letters, stops_lists, st.lists(st.integers(0, 24)))
@example("aab", ["ab"], [1, 2])
@example("abcd", ["abcd", "bc"], [3])
def test_any_split_of_a_text_is_cut_as_the_whole_is(text, stops, cuts):
    cutter = StopCutter(stops)
    out = "".join(cutter.push(piece) for piece in split(text, cuts)) + cutter.flush()
    assert (out, cutter.is_stopped) == cut(text, stops)


@given(few_letters, stops_lists)
def test_only_what_may_become_a_stop_string_is_held_back(text, stops):
    cutter = StopCutter(stops)
    out = ""
    for end, character in enumerate(text, 1):
        out += cutter.push(character)
        if cutter.is_stopped:
            break
        held = text[len(out) : end]
        assert out + held == text[:end]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@given(st.binary(max_size=40), stops_lists)
def test_any_bytes_come_out_as_decoded_whole(data, stops):
    """Invalid and incomplete UTF-8 included: one token is one byte here."""
    detokenizer = Detokenizer(TOKEN_BYTES, stops)
    out = ""
    for token_id in data:
        out += detokenizer.push(token_id)
        if detokenizer.is_stopped:
            break
    out += detokenizer.finish()
    assert (out, detokenizer.is_stopped) == cut(data.decode("utf-8", "replace"), stops)


@given(st.text(max_size=12))
def test_no_character_is_ever_split(text):
    detokenizer = Detokenizer(TOKEN_BYTES)
    pieces = [detokenizer.push(token_id) for token_id in text.encode()]
    assert "".join(pieces) == text
    assert detokenizer.finish() == ""
    assert all(piece == "" or piece in text for piece in pieces)


def test_special_tokens_add_no_text():
    detokenizer = Detokenizer(TOKEN_BYTES)
    assert [detokenizer.push(token) for token in (72, END_TOKEN_ID, 105)] == ["H", "", "i"]


def test_ids_beyond_the_vocabulary_add_no_text():
    assert Detokenizer(TOKEN_BYTES).push(100_000) == ""


@pytest.mark.parametrize("stops", [[], ["!"]])
def test_a_cut_character_at_the_end_becomes_a_replacement(stops):
    detokenizer = Detokenizer(TOKEN_BYTES, stops)
    assert [detokenizer.push(byte) for byte in "ö".encode()[:1]] == [""]
    assert detokenizer.finish() == "\ufffd"
