"""Percentiles and rates of what was measured. Pure arithmetic on answers."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from benchmarks.load.answer import Answer


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of sorted `values` lie, linear between neighbours.

    The same as numpy's default. There must be a value.
    """
    position = (len(values) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(values) - 1)
    return values[below] + (values[above] - values[below]) * (position - below)


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantiles:
    """The usual places of a distribution with at least one sample, in milliseconds."""

    count: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float

    @classmethod
    def of(cls, values_s: Iterable[float]) -> "Quantiles | None":
        """None where there is no sample."""
        values_ms = sorted(value * 1000 for value in values_s)
        if not values_ms:
            return None
        return cls(
            count=len(values_ms),
            p50_ms=percentile(values_ms, 50),
            p90_ms=percentile(values_ms, 90),
            p99_ms=percentile(values_ms, 99),
            max_ms=percentile(values_ms, 100),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Answers and the time [start_s, end_s] in which their tokens count."""

    answers: tuple[Answer, ...]
    start_s: float
    end_s: float

    @classmethod
    def around(cls, answers: Sequence[Answer]) -> "Window":
        """From the first request to the last byte: every token counts."""
        start_s = min((answer.start_s for answer in answers), default=0.0)
        end_s = max((answer.end_s for answer in answers), default=0.0)
        return cls(answers=tuple(answers), start_s=start_s, end_s=end_s)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What a load's answers come to. Latencies are of answers without an error."""

    num_requests: int
    errors: dict[str, int]
    """How often each error came, by its text."""
    output_tokens: float
    duration_s: float
    output_tokens_per_s: float
    tokens_per_chunk: float
    itl: Quantiles | None
    ttft: Quantiles | None
    latency: Quantiles | None
    """Of answers that ended by themselves."""

    @property
    def num_errors(self) -> int:
        return sum(self.errors.values())


def figures_of(windows: Sequence[Window]) -> Figures:
    """Pool the windows of repeated runs.

    A token counts if it came inside its window. A gap counts, whole, if any of it lies inside: a
    stall must not be lost because it began just before the window or outlasted it.
    """
    good = [
        (window, answer)
        for window in windows
        for answer in window.answers
        if not answer.error and answer.chunk_times_s
    ]
    output_tokens = sum(_tokens_inside(window, answer) for window, answer in good)
    duration_s = sum(window.end_s - window.start_s for window in windows)
    num_chunks = sum(len(answer.chunk_times_s) for _, answer in good)
    errors = Counter(answer.error for window in windows for answer in window.answers)
    errors.pop("", None)
    return Figures(
        num_requests=sum(len(window.answers) for window in windows),
        errors=dict(errors),
        output_tokens=output_tokens,
        duration_s=duration_s,
        output_tokens_per_s=output_tokens / duration_s if duration_s else 0.0,
        tokens_per_chunk=sum(answer.num_tokens for _, answer in good) / num_chunks
        if num_chunks
        else 0.0,
        itl=Quantiles.of(
            gap_s
            for window, answer in good
            for when_s, gap_s in answer.gaps_s
            if when_s > window.start_s and when_s - gap_s < window.end_s
        ),
        ttft=Quantiles.of(answer.ttft_s for _, answer in good),
        latency=Quantiles.of(answer.latency_s for _, answer in good if answer.is_complete),
    )


def _tokens_inside(window: Window, answer: Answer) -> float:
    """Tokens are spread evenly over an answer's chunks, which servers do not label with counts."""
    inside = sum(window.start_s <= when_s <= window.end_s for when_s in answer.chunk_times_s)
    return answer.num_tokens * inside / len(answer.chunk_times_s)
