"""Tables of what was measured, and what it says about the claims."""

from collections.abc import Callable, Sequence
from dataclasses import astuple
from statistics import geometric_mean

from benchmarks.moving.case import Case
from benchmarks.moving.figure import Figure, Overlap

LARGE_BYTES = 1 << 20
"""From here on a case is long enough for a rate; below, one call's fixed time decides."""
EXPOSED_BOUNDS = {512: 0.05, 2000: 0.02}
FIRST_TOKEN_BOUND = 0.03

Rates = dict[str, dict[Case, Figure]]


def rates_of(figures: Sequence[Figure]) -> Rates:
    """By way, the faster of writing and reading where there are both."""
    found: Rates = {}
    for figure in figures:
        way = figure.way.replace(" write", "").replace(" read", "")
        case = Case(figure.block_bytes, figure.num_blocks)
        before = found.setdefault(way, {}).get(case)
        if before is None or figure.median_gb_per_s > before.median_gb_per_s:
            found[way][case] = figure
    return found


def rate_table(figures: Sequence[Figure]) -> str:
    """A line a case: GB/s of the median run and of the best, and CPU seconds per GB of each way."""
    rates = rates_of(figures)
    if not rates:
        return ""
    lines = [f"{'GB/s, best, s/GB':>16} " + " ".join(f"{way:>18}" for way in rates)]
    for case in next(iter(rates.values())):
        cells = [
            "{:5.2f} {:5.2f} {:6.2f}".format(*astuple(some[case])[3:]) if case in some else "-"
            for some in rates.values()
        ]
        name = f"{case.num_blocks} x {case.block_bytes >> 10} KiB"
        lines.append(f"{name:>16} " + " ".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def overlap_table(overlaps: Sequence[Overlap]) -> str:
    """A line a prompt length."""
    if not overlaps:
        return ""
    lines = ["tokens  prefill ms  exposed ms  share  first token ms  alone ms  cost"]
    lines += [
        f"{some.num_tokens:6} {some.prefill_ms:11.1f} {some.exposed_ms:11.2f}"
        f" {some.exposed_share:6.1%} {some.first_token_ms:15.1f} {some.alone_ms:9.1f}"
        f" {some.first_token_cost:+5.1%}"
        for some in overlaps
    ]
    return "\n".join(lines)


def verdicts(figures: Sequence[Figure], overlaps: Sequence[Overlap]) -> str:
    """Each claim, the figures that decide it, met or not."""
    rates = rates_of(figures)
    claims = [
        ("shm", "memory copy", 0.8),
        ("shm", "NIXL", 2.0),
        ("tcp", "plain socket", 0.9),
        ("tcp", "NIXL, tcp", 2.0),
    ]
    lines = [
        _compared(rates, ours, theirs, bound, runs, rate)
        for ours, theirs, bound in claims
        for runs, rate in _RUNS.items()
        if ours in rates and theirs in rates
    ]
    for some in overlaps:
        if (bound := EXPOSED_BOUNDS.get(some.num_tokens)) is not None:
            lines.append(
                f"exposed of prefill, {some.num_tokens} tokens: {some.exposed_share:.1%},"
                f" at most {bound:.0%}: {_met(some.exposed_share <= bound)}"
            )
        lines.append(
            f"first token beside a handover, {some.num_tokens} tokens:"
            f" {some.first_token_cost:+.1%} of alone, within {FIRST_TOKEN_BOUND:.0%}:"
            f" {_met(abs(some.first_token_cost) <= FIRST_TOKEN_BOUND)}"
        )
    return "\n".join(lines)


def _compared(
    rates: Rates, ours: str, theirs: str, bound: float, runs: str, rate: Callable[[Figure], float]
) -> str:
    ratios = {
        case: rate(figure) / rate(rates[theirs][case])
        for case, figure in rates[ours].items()
        if case in rates[theirs]
    }
    parts = []
    for name, is_meant in _SIZES.items():
        some = [ratio for case, ratio in ratios.items() if is_meant(case)]
        if some:
            num_met = sum(ratio >= bound for ratio in some)
            mean = geometric_mean(some)
            parts.append(f"{name} {mean:.2f} x, {num_met} of {len(some)} cases met")
    return f"{ours} / {theirs}, at least {bound}, {runs}: " + "; ".join(parts)


_RUNS: dict[str, Callable[[Figure], float]] = {
    "medians": lambda figure: figure.median_gb_per_s,
    "best runs": lambda figure: figure.best_gb_per_s,
}
_SIZES: dict[str, Callable[[Case], bool]] = {
    "from 1 MiB on": lambda case: case.num_bytes >= LARGE_BYTES,
    "below": lambda case: case.num_bytes < LARGE_BYTES,
}


def _met(is_met: bool) -> str:  # noqa: FBT001 - one word for it
    return "met" if is_met else "not met"
