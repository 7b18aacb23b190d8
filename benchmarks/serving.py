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
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import uvloop

from benchmarks.load.comparison import compare
from benchmarks.load.mesh import started_mesh
from benchmarks.load.outcome import Machine, Outcome, write_outcome
from benchmarks.load.process_cpu import meter_of_state_file, no_meter
from benchmarks.load.scenario import Load, TraceLoad, standard_loads
from benchmarks.load.schedule import TokenRange
from benchmarks.load.target import Target, find_target
from benchmarks.load.verdict import verdicts_of
from benchmarks.report import serving_report, serving_table
from engine.errors import InvalidRequestError, IsthmusError

MESH_NAME = "mesh"
INTERRUPTED = 130


@asynccontextmanager
async def _targets(
    options: argparse.Namespace, mesh_arguments: Sequence[str]
) -> AsyncIterator[list[Target]]:
    """The targets given, after a mesh of our own if one is wanted or none was given."""
    async with AsyncExitStack() as stack:
        found: list[Target] = []
        if options.start or mesh_arguments or not options.target:
            mesh = await stack.enter_async_context(started_mesh(mesh_arguments))
            meter = meter_of_state_file(mesh.state_file)
            found.append(await find_target(f"{MESH_NAME}={mesh.url}", meter=meter))
        for text in options.target:
            is_ours = options.state_file and text.startswith(f"{MESH_NAME}=")
            meter = meter_of_state_file(options.state_file) if is_ours else no_meter
            found.append(await find_target(text, meter=meter))
        if len({target.name for target in found}) < len(found):
            names = ", ".join(target.name for target in found)
            raise InvalidRequestError(f"targets must have different names, got {names}")
        yield found


async def run(options: argparse.Namespace, mesh_arguments: Sequence[str]) -> Outcome:
    """Do what the command line asks; the outcome is not yet printed or written."""
    loads = _chosen_loads(options)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    async with _targets(options, mesh_arguments) as targets:
        trials = await compare(
            targets,
            loads,
            tokens=options.token_ids,
            seed=options.seed,
            num_repeats=options.repeat,
            say=_say,
            on_rows=lambda rows: _say(serving_table(rows) + "\n"),
        )
    rows = [row for trial in trials for row in trial.rows()]
    costs = [trial.cost() for trial in trials]
    return Outcome(
        started_at=started_at,
        seed=options.seed,
        is_quick=options.quick,
        num_repeats=options.repeat,
        machine=Machine.this(),
        targets={target.name: target.model for target in targets},
        loads={load.name: str(load) for load in loads},
        rows=tuple(rows),
        costs=tuple(costs),
        verdicts=verdicts_of(rows, costs, baseline=options.baseline),
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
    add("--state-file", type=Path, metavar="FILE", help="of the target mesh: meters its CPU")
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


def _say(text: str) -> None:
    """Progress, and the figures so far should the run be interrupted; apart from the report."""
    print(text, file=sys.stderr, flush=True)


async def _until_terminated(work: Coroutine[None, None, Outcome]) -> Outcome:
    """Let SIGTERM end the work as Ctrl-C does, so that a mesh of ours is stopped with us."""
    task = asyncio.current_task()
    assert task is not None, "a coroutine runs in a task"
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        return await work
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


def main(arguments: Sequence[str]) -> int:
    """Run from the command line; returns the exit status: 0 unless something failed to run."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parsed(arguments[:split])
    try:
        outcome = uvloop.run(_until_terminated(run(options, arguments[split + 1 :])))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("benchmarks.serving: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (IsthmusError, ConnectionError) as error:
        print(f"benchmarks.serving: {error}", file=sys.stderr)
        return 1
    print(serving_report(outcome))
    if options.json:
        write_outcome(options.json, outcome)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
