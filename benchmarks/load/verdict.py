"""Holds the figures of a run against what we claim; states, and excuses nothing."""

import math
from collections.abc import Sequence

from benchmarks.load.figures import Figures
from benchmarks.load.outcome import Row, Verdict

MAX_MIXED_P99_RATIO = 2.0
MIN_MIXED_TOKENS_KEPT = 0.8
MAX_OPEN_P99_SHARE = 0.1


def verdicts_of(rows: Sequence[Row], *, baseline: str) -> tuple[Verdict, ...]:
    """Each target's claims; those against `baseline` only where it was measured beside."""
    figures = {(row.target, row.phase): row.figures for row in rows}
    targets = list(dict.fromkeys(row.target for row in rows))
    verdicts: list[Verdict] = []
    for target in targets:
        alone, disturbed = (
            figures.get((target, f"mixed {phase}")) for phase in ("alone", "disturbed")
        )
        if alone and disturbed:
            verdicts += _mixed(target, alone, disturbed)
        if target != baseline:
            verdicts += _against(target, baseline, figures)
    return tuple(verdicts)


def _mixed(target: str, alone: Figures, disturbed: Figures) -> list[Verdict]:
    ratio = _ratio(disturbed.itl.p99_ms, alone.itl.p99_ms)
    kept = _ratio(disturbed.output_tokens_per_s, alone.output_tokens_per_s)
    return [
        Verdict(
            target=target,
            claim=f"mixed: p99 inter-token time, disturbed / alone <= {MAX_MIXED_P99_RATIO:g}",
            value=ratio,
            is_met=ratio <= MAX_MIXED_P99_RATIO,
        ),
        Verdict(
            target=target,
            claim=f"mixed: share of tokens/s kept >= {MIN_MIXED_TOKENS_KEPT:g}",
            value=kept,
            is_met=kept >= MIN_MIXED_TOKENS_KEPT,
        ),
    ]


def _against(target: str, baseline: str, figures: dict[tuple[str, str], Figures]) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for load in ("single", "closed", "closed16"):
        mine, theirs = figures.get((target, load)), figures.get((baseline, load))
        if mine and theirs:
            ratio = _ratio(mine.output_tokens_per_s, theirs.output_tokens_per_s)
            claim = f"{load}: output tokens/s, share of {baseline}'s >= 1"
            verdicts.append(Verdict(target=target, claim=claim, value=ratio, is_met=ratio >= 1))
    mine, theirs = figures.get((target, "open")), figures.get((baseline, "open"))
    if mine and theirs:
        share = _ratio(mine.itl.p99_ms, theirs.itl.p99_ms)
        claim = f"open: p99 inter-token time, share of {baseline}'s <= {MAX_OPEN_P99_SHARE:g}"
        verdicts.append(
            Verdict(target=target, claim=claim, value=share, is_met=share <= MAX_OPEN_P99_SHARE)
        )
    return verdicts


def _ratio(mine: float, theirs: float) -> float:
    """NaN, which meets no claim, where either side has no figure."""
    return mine / theirs if theirs else math.nan
