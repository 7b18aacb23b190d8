"""Prints what benchmarks found: the table of a serving run, again from its JSON file if asked.

`python -m benchmarks.report FILE...` prints Markdown for pages such as the README.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.load.figures import Quantiles
from benchmarks.load.outcome import FORMAT, Cost, Outcome, Row

HEAD = (
    "load",
    "target",
    "tokens/s",
    "inter-token p50 / p90 / p99 ms",
    "TTFT p50 / p90 / p99 ms",
    "request p50 ms",
    "requests",
    "errors",
)

NOISE_CORES = 0.2
"""More than this in use before a load begins is said below the table."""


def serving_table(rows: Sequence[Row], *, is_markdown: bool = False) -> str:
    """One line for each phase and target, targets side by side."""
    order = {phase: index for index, phase in enumerate(dict.fromkeys(row.phase for row in rows))}
    lines = [HEAD, *(_cells(row) for row in sorted(rows, key=lambda row: order[row.phase]))]
    if is_markdown:
        rule = tuple("---" for _ in HEAD)
        return "\n".join("| " + " | ".join(line) + " |" for line in (HEAD, rule, *lines[1:]))
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def serving_report(outcome: Outcome, *, is_markdown: bool = False) -> str:
    """Where it ran, the table, CPU time, the verdicts, and what spoils them: noise and errors."""
    machine = outcome.machine
    noise = {(row.load, row.target): row.busy_cores_before for row in outcome.rows}
    bullet = "* " if is_markdown else ""
    blocks = [
        f"{machine.cpu}, {machine.num_cores} cores; {outcome.started_at}; seed {outcome.seed}"
        + ("; quick" if outcome.is_quick else ""),
        "\n".join(f"{bullet}{name}: {words}" for name, words in outcome.loads.items()),
        serving_table(outcome.rows, is_markdown=is_markdown),
        "\n".join(f"{bullet}{_cost(cost)}" for cost in outcome.costs if cost.cpu_s),
        "\n".join(f"{bullet}{verdict}" for verdict in outcome.verdicts),
        "\n".join(
            f"{bullet}noise: {cores:.1f} cores were busy before {load} on {target}"
            for (load, target), cores in noise.items()
            if cores > NOISE_CORES
        ),
        "\n".join(
            f"{bullet}{row.target}, {row.phase}: {count} times {error}"
            for row in outcome.rows
            for error, count in row.figures.errors.items()
        ),
    ]
    return "\n\n".join(block for block in blocks if block)


def _cost(cost: Cost) -> str:
    shares = (f"{name} {used_s:.2f}" for name, used_s in sorted(cost.cpu_s.items()))
    return f"CPU seconds of {cost.target} in {cost.load}: {', '.join(shares)}"


def _cells(row: Row) -> tuple[str, ...]:
    figures = row.figures
    return (
        row.phase,
        row.target,
        f"{figures.output_tokens_per_s:.1f}",
        _quantiles(figures.itl),
        _quantiles(figures.ttft),
        _quantiles(figures.latency).partition(" ")[0],
        str(figures.num_requests),
        str(figures.num_errors),
    )


def _quantiles(quantiles: Quantiles | None) -> str:
    if quantiles is None:
        return "-"
    values = (quantiles.p50_ms, quantiles.p90_ms, quantiles.p99_ms)
    return " / ".join(f"{value:.1f}" if value < 100 else f"{value:.0f}" for value in values)


def main(paths: Sequence[str]) -> int:
    """Print each file's report as Markdown; returns the exit status."""
    for path in paths:
        outcome = msgspec.json.decode(Path(path).read_bytes(), type=Outcome)
        if outcome.format != FORMAT:
            print(f"{path}: not a serving benchmark's file ({outcome.format})", file=sys.stderr)
            return 1
        print(serving_report(outcome, is_markdown=True), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
