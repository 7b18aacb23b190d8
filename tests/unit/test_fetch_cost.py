"""The rule that says whether a prefix is fetched: it follows what was measured."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.runtime.commands import EngineStats
from kv_transfer.prefix.fetch_cost import PROBE_EVERY, Choice, FetchCost, RunningLine


def cost_of(
    *, latency_s: float, bytes_per_s: float, tokens_per_s: float, num_tokens: int = 1000
) -> FetchCost:
    cost = FetchCost()
    for num_bytes in (1e5, 1e6, 1e7):
        cost.observe_fetch(int(num_bytes), latency_s + num_bytes / bytes_per_s)
    cost.observe_engine(
        EngineStats(num_prefill_tokens=num_tokens, prefill_s_total=num_tokens / tokens_per_s)
    )
    return cost


@given(
    start=st.floats(0, 1),
    slope=st.floats(1e-9, 1e-6),
    xs=st.lists(st.integers(1_000, 10_000_000), min_size=2, max_size=20, unique=True),
)
def test_line_finds_latency_and_rate(start, slope, xs):
    line = RunningLine()
    for x in xs:
        line.observe(x, start + slope * x)
    if max(xs) > 2 * min(xs):
        for x in (min(xs), 5_000_000):
            assert line.predict(x) == pytest.approx(start + slope * x, rel=1e-3, abs=1e-6)


@given(st.lists(st.tuples(st.integers(1, 1 << 30), st.floats(1e-6, 10)), min_size=1))
def test_line_is_never_negative(points):
    line = RunningLine()
    for x, y in points:
        line.observe(x, y)
    for x in (0, 1, 1 << 20, 1 << 31):
        predicted = line.predict(x)
        assert predicted is not None
        assert predicted >= 0


def test_line_forgets_what_was_long_ago():
    line = RunningLine()
    for _ in range(10):
        line.observe(100, 1.0)
    for _ in range(20):
        line.observe(100, 2.0)
    assert line.predict(100) == pytest.approx(2.0, rel=0.02)


def test_nothing_measured_means_fetch():
    assert FetchCost().choose(num_tokens=16, num_bytes=1) == Choice(
        is_fetch=True, reason="unmeasured"
    )


def test_cheaper_way_depends_on_the_link_and_on_the_engine():
    fast = cost_of(latency_s=0.002, bytes_per_s=1e9, tokens_per_s=1000)
    assert fast.choose(num_tokens=160, num_bytes=160 * 23040) == Choice(
        is_fetch=True, reason="cheaper"
    )
    slow = cost_of(latency_s=0.002, bytes_per_s=1e7, tokens_per_s=1000)
    assert slow.choose(num_tokens=160, num_bytes=160 * 23040) == Choice(
        is_fetch=False, reason="cheaper"
    )
    strong = cost_of(latency_s=0.002, bytes_per_s=1e9, tokens_per_s=100_000)
    assert not strong.choose(num_tokens=160, num_bytes=160 * 23040).is_fetch


def test_latency_decides_for_short_prefixes():
    cost = cost_of(latency_s=0.1, bytes_per_s=1e9, tokens_per_s=1000)
    assert not cost.choose(num_tokens=16, num_bytes=16 * 23040).is_fetch
    assert cost.choose(num_tokens=1600, num_bytes=1600 * 23040).is_fetch


def test_refused_store_is_tried_again_now_and_then():
    cost = cost_of(latency_s=10, bytes_per_s=1e9, tokens_per_s=1000)
    chosen = [cost.choose(num_tokens=16, num_bytes=1000) for _ in range(2 * PROBE_EVERY)]
    assert [index for index, each in enumerate(chosen, 1) if each.is_fetch] == [
        PROBE_EVERY,
        2 * PROBE_EVERY,
    ]
    assert chosen[PROBE_EVERY - 1].reason == "probe"
    for _ in range(40):
        cost.observe_fetch(1000, 0.001)
    assert cost.choose(num_tokens=16, num_bytes=1000) == Choice(is_fetch=True, reason="cheaper")


def test_prefill_rate_follows_the_engine():
    cost = cost_of(latency_s=0, bytes_per_s=1e9, tokens_per_s=1000, num_tokens=8192)
    assert cost.compute_s(500) == pytest.approx(0.5)
    cost.observe_engine(EngineStats(num_prefill_tokens=16384, prefill_s_total=8.192 + 2.048))
    assert cost.prefill_tokens_per_s is not None
    assert 2000 < cost.prefill_tokens_per_s < 4000
    before = cost.prefill_tokens_per_s
    cost.observe_engine(EngineStats(num_prefill_tokens=16389, prefill_s_total=10.24 + 0.1))
    assert cost.prefill_tokens_per_s == pytest.approx(before, rel=0.05), "five tokens say little"
