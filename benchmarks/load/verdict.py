"""Holds the figures of a run against what we claim; states, and excuses nothing."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.load.figures import Figures, Quantiles
from benchmarks.load.outcome import Cost, Row, Verdict

MAX_MIXED_P99_RATIO = 2.0
MIN_MIXED_TOKENS_KEPT = 0.8
MAX_OPEN_P99_SHARE = 0.1
GATEWAY_CPU_S_PER_REQUEST = 1e-3
GATEWAY_CPU_S_PER_TOKEN = 20e-6
GATEWAY = "gateway"

FiguresOfPhases = Mapping[tuple[str, str], Figures]
"""By (target, phase)."""


def verdicts_of(
    rows: Sequence[Row], costs: Sequence[Cost], *, baseline: str
) -> tuple[Verdict, ...]:
    """Each target's claims; those against `baseline` only where it was measured beside."""
    figures = {(row.target, row.phase): row.figures for row in rows}
    verdicts: list[Verdict] = []
    for target in dict.fromkeys(row.target for row in rows):
        verdicts += _mixed(target, figures)
        if target != baseline:
            verdicts += _throughput(target, baseline, figures)
            verdicts += _open(target, baseline, figures)
    verdicts += _gateway(costs)
    return tuple(verdicts)


def _gateway(costs: Sequence[Cost]) -> Iterator[Verdict]:
    for cost in costs:
        used_s = [cpu_s for name, cpu_s in cost.cpu_s.items() if name.startswith(GATEWAY)]
        allowed_s = (
            cost.num_requests * GATEWAY_CPU_S_PER_REQUEST
            + cost.num_tokens * GATEWAY_CPU_S_PER_TOKEN
        )
        if used_s:
            yield _at_most(
                1.0,
                sum(used_s) / allowed_s,
                target=cost.target,
                claim=f"{cost.load}: gateway CPU as a share of 1 ms a request + 20 us a token",
            )


def _mixed(target: str, figures: FiguresOfPhases) -> Iterator[Verdict]:
    alone = figures.get((target, "mixed alone"))
    disturbed = figures.get((target, "mixed disturbed"))
    if alone is None or disturbed is None:
        return
    yield _at_most(
        MAX_MIXED_P99_RATIO,
        _ratio(_p99_ms(disturbed.itl), _p99_ms(alone.itl)),
        target=target,
        claim="mixed: p99 inter-token time, disturbed / alone",
    )
    yield _at_least(
        MIN_MIXED_TOKENS_KEPT,
        _ratio(disturbed.output_tokens_per_s, alone.output_tokens_per_s),
        target=target,
        claim="mixed: share of tokens/s kept",
    )


def _throughput(target: str, baseline: str, figures: FiguresOfPhases) -> Iterator[Verdict]:
    for load in ("single", "closed", "closed16"):
        mine, theirs = figures.get((target, load)), figures.get((baseline, load))
        if mine is not None and theirs is not None:
            yield _at_least(
                1.0,
                _ratio(mine.output_tokens_per_s, theirs.output_tokens_per_s),
                target=target,
                claim=f"{load}: output tokens/s as a share of {baseline}'s",
            )


def _open(target: str, baseline: str, figures: FiguresOfPhases) -> Iterator[Verdict]:
    mine, theirs = figures.get((target, "open")), figures.get((baseline, "open"))
    if mine is not None and theirs is not None:
        yield _at_most(
            MAX_OPEN_P99_SHARE,
            _ratio(_p99_ms(mine.itl), _p99_ms(theirs.itl)),
            target=target,
            claim=f"open: p99 inter-token time as a share of {baseline}'s",
        )


def _at_most(bound: float, value: float | None, *, target: str, claim: str) -> Verdict:
    is_met = value is not None and value <= bound
    return Verdict(target=target, claim=f"{claim} <= {bound:g}", value=value, is_met=is_met)


def _at_least(bound: float, value: float | None, *, target: str, claim: str) -> Verdict:
    is_met = value is not None and value >= bound
    return Verdict(target=target, claim=f"{claim} >= {bound:g}", value=value, is_met=is_met)


def _p99_ms(quantiles: Quantiles | None) -> float | None:
    return None if quantiles is None else quantiles.p99_ms


def _ratio(mine: float | None, theirs: float | None) -> float | None:
    return mine / theirs if mine is not None and theirs else None
