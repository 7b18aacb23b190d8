import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.load.answer import Answer
from benchmarks.load.figures import Quantiles, Window, figures_of, percentile


def answer(*chunk_times_s: float, num_tokens: int | None = None, error: str = "") -> Answer:
    return Answer(
        start_s=0.0,
        end_s=chunk_times_s[-1] if chunk_times_s else 0.0,
        chunk_times_s=chunk_times_s,
        num_tokens=len(chunk_times_s) if num_tokens is None else num_tokens,
        is_complete=True,
        error=error,
    )


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50),
    st.floats(0, 100),
)
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    expected = float(np.percentile(values, percent))
    assert percentile(sorted(values), percent) == pytest.approx(expected, abs=1e-6)


def some(quantiles: Quantiles | None) -> Quantiles:
    assert quantiles is not None
    return quantiles


def test_nothing_has_no_quantiles() -> None:
    assert Quantiles.of([]) is None


def test_quantiles_are_in_milliseconds() -> None:
    assert some(Quantiles.of([0.003, 0.001, 0.002])).p50_ms == pytest.approx(2.0)


def test_a_window_counts_only_what_came_inside_it() -> None:
    window = Window(answers=(answer(1.0, 2.0, 3.0, 4.0),), start_s=1.5, end_s=3.5)
    figures = figures_of([window])
    assert figures.output_tokens == 2
    assert figures.output_tokens_per_s == pytest.approx(1.0)


def test_gaps_that_reach_into_a_window_count_whole() -> None:
    window = Window(answers=(answer(0.5, 1.0, 5.0, 6.0, 11.0, 12.0),), start_s=1.5, end_s=9.0)
    itl = some(figures_of([window]).itl)
    assert itl.count == 3
    assert itl.p50_ms == pytest.approx(4000)
    assert itl.max_ms == pytest.approx(5000)


def test_bundled_tokens_lengthen_gaps_and_keep_their_count() -> None:
    bundled = answer(1.0, 3.0, num_tokens=4)
    figures = figures_of([Window(answers=(bundled,), start_s=0.0, end_s=4.0)])
    assert figures.output_tokens == 4
    assert figures.tokens_per_chunk == 2
    assert some(figures.itl).p50_ms == pytest.approx(2000)
    assert some(figures.itl).count == 1


def test_failed_answers_are_counted_and_give_no_latency() -> None:
    answers = (answer(1.0, 2.0), answer(error="status 500: x"), answer(9.0, error="status 500: x"))
    figures = figures_of([Window.around(answers)])
    assert figures.errors == {"status 500: x": 2}
    assert figures.num_errors == 2
    assert figures.num_requests == 3
    assert some(figures.ttft).count == some(figures.latency).count == 1


def test_repeats_are_pooled() -> None:
    windows = [
        Window(answers=(answer(1.0, 2.0),), start_s=0.0, end_s=2.0),
        Window(answers=(answer(1.0, 5.0),), start_s=0.0, end_s=6.0),
    ]
    figures = figures_of(windows)
    assert figures.output_tokens_per_s == pytest.approx(4 / 8)
    assert some(figures.itl).p50_ms == pytest.approx(2500)
