"""Measures served models under closed, open and mixed load, side by side in one run.

    python -m benchmarks.serving                               # starts a mesh with `isthmus up`
    python -m benchmarks.serving -- --model PATH --decode 2    # the same, with options for it
    python -m benchmarks.serving --start --target vllm=http://127.0.0.1:8001
    python -m benchmarks.serving --target mesh=http://127.0.0.1:8000 --target vllm=http://...

Every load is played on all targets before the next one begins, so that a noisy machine is noisy
for all. The prompts are random token ids without shared prefixes; a fresh seed each run keeps a
server's prefix cache from knowing them.
"""

import argparse
import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import psutil
import uvloop

from benchmarks.load.driver import Driver, Run
from benchmarks.load.figures import figures_of
from benchmarks.load.mesh import started_mesh
from benchmarks.load.outcome import Machine, Outcome, Row, write_outcome
from benchmarks.load.scenario import Load, TraceLoad, standard_loads
from benchmarks.load.schedule import TokenRange
from benchmarks.load.target import Target, find_target
from benchmarks.load.verdict import verdicts_of
from benchmarks.report import serving_report
from engine.errors import IsthmusError

MESH_NAME = "mesh"
SETTLE_S = 0.5
SAMPLE_S = 1.0
Say = Callable[[str], None]


async def measure(
    targets: Sequence[Target],
    loads: Sequence[Load],
    *,
    tokens: TokenRange,
    seed: int,
    num_repeats: int,
    say: Say,
) -> list[Row]:
    """Play every load on every target, `num_repeats` times; the order of targets alternates."""
    rows: list[Row] = []
    for load in loads:
        runs: dict[str, list[Run]] = {target.name: [] for target in targets}
        busy_cores: dict[str, float] = {target.name: 0.0 for target in targets}
        for repeat in range(num_repeats):
            for target in targets if repeat % 2 == 0 else reversed(targets):
                say(f"{load.name} on {target.name} ({repeat + 1} of {num_repeats}): {load}")
                noise = await _busy_cores()
                busy_cores[target.name] = max(busy_cores[target.name], noise)
                run = await Driver(target, tokens).play(load, seed=seed + repeat)
                runs[target.name].append(run)
        for target in targets:
            rows += _rows(load, target, runs[target.name], busy_cores[target.name])
    return rows


def _rows(load: Load, target: Target, runs: Sequence[Run], busy_cores: float) -> list[Row]:
    num_tokens = sum(
        answer.num_tokens
        for run in runs
        for window in run.windows.values()
        for answer in window.answers
    )
    return [
        Row(
            target=target.name,
            load=load.name,
            phase=phase,
            figures=figures_of([run.windows[phase] for run in runs]),
            tokens_per_s_by_repeat=tuple(
                figures_of([run.windows[phase]]).output_tokens_per_s for run in runs
            ),
            client_cpu_us_per_token=sum(run.client_cpu_s for run in runs)
            / max(1, num_tokens)
            * 1e6,
            busy_cores_before=busy_cores,
        )
        for phase in runs[0].windows
    ]


async def _busy_cores() -> float:
    """Cores that this machine keeps busy while no load of ours is running."""
    await asyncio.sleep(SETTLE_S)
    psutil.cpu_percent()
    await asyncio.sleep(SAMPLE_S)
    return psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)


@asynccontextmanager
async def _targets(
    options: argparse.Namespace, mesh_arguments: Sequence[str]
) -> AsyncIterator[list[str]]:
    """The NAME=URL texts given, after a mesh of our own if one is wanted or none was given."""
    texts: list[str] = options.target
    if texts and not options.start and not mesh_arguments:
        yield texts
        return
    async with started_mesh(mesh_arguments) as url:
        yield [f"{MESH_NAME}={url}", *texts]


async def run(options: argparse.Namespace, mesh_arguments: Sequence[str]) -> Outcome:
    """Do what the command line asks; the outcome is not yet printed or written."""
    loads = _chosen_loads(options)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    async with _targets(options, mesh_arguments) as texts:
        targets = [await find_target(text) for text in texts]
        rows = await measure(
            targets,
            loads,
            tokens=options.token_ids,
            seed=options.seed,
            num_repeats=options.repeat,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    return Outcome(
        started_at=started_at,
        seed=options.seed,
        is_quick=options.quick,
        num_repeats=options.repeat,
        machine=Machine.this(),
        targets={target.name: target.model for target in targets},
        loads={load.name: str(load) for load in loads},
        rows=tuple(rows),
        verdicts=verdicts_of(rows, baseline=options.baseline),
    )


def _chosen_loads(options: argparse.Namespace) -> list[Load]:
    if options.trace:
        trace = TraceLoad(
            name="trace",
            file=options.trace,
            rate=options.rate,
            max_prompt_tokens=options.max_input,
            max_output_tokens=options.max_output,
            num_requests=options.num_requests,
        )
        return [trace]
    loads = standard_loads(is_quick=options.quick)
    return [loads[name] for name in options.scenario or loads]


def _token_range(text: str) -> TokenRange:
    start, _, stop = text.partition(":")
    return TokenRange(start=int(start), stop=int(stop))


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
        return value

    return parse


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; leaves the process on a bad one, as argparse does."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving",
        description="Load on OpenAI-compatible servers, side by side. Without --target a mesh is"
        " started with `isthmus up`; what follows -- is handed to it.",
    )
    add = parser.add_argument
    add("--target", action="append", default=[], metavar="NAME=URL", help="repeat to compare")
    add("--start", action="store_true", help="start a mesh beside the targets given")
    add("--baseline", default="vllm", metavar="NAME", help="the target others are held against")
    names = [*standard_loads(is_quick=True)]
    add("--scenario", action="append", choices=names, help="repeat; all by default")
    add(
        "--repeat",
        type=_positive(int),
        default=1,
        metavar="N",
        help="play each load N times, pooled",
    )
    add("--quick", action="store_true", help="a third of the requests")
    add("--seed", type=int, default=secrets.randbelow(2**31), help="fresh by default")
    add("--token-ids", type=_token_range, default="1000:30000", metavar="START:STOP")
    add("--json", type=Path, metavar="FILE", help="write all figures here")
    trace = parser.add_argument_group("replay of a request trace (Mooncake's format)")
    trace.add_argument("--trace", metavar="FILE", help="play this instead of the scenarios")
    trace.add_argument(
        "--rate", type=_positive(float), default=1.0, help="times as fast as recorded"
    )
    trace.add_argument("--max-input", type=_positive(int), default=2048, help="cut prompts to this")
    trace.add_argument("--max-output", type=_positive(int), default=64, help="cut answers to this")
    trace.add_argument("--num-requests", type=_positive(int), default=100, help="the first so many")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; returns the exit status: 0 unless something failed to run."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parsed(arguments[:split])
    try:
        outcome = uvloop.run(run(options, arguments[split + 1 :]))
    except (IsthmusError, ConnectionError) as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 1
    print(serving_report(outcome))
    if options.json:
        write_outcome(options.json, outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
