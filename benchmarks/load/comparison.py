"""Plays the same loads on several targets in turn and gathers what they came to."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import psutil

from benchmarks.load.driver import Driver, Run
from benchmarks.load.figures import figures_of
from benchmarks.load.outcome import Cost, Row
from benchmarks.load.process_cpu import total_of
from benchmarks.load.scenario import Load
from benchmarks.load.schedule import TokenRange
from benchmarks.load.target import Target

SETTLE_S = 0.5
SAMPLE_S = 1.0


@dataclass(slots=True)
class Trials:
    """All runs of one load on one target."""

    load: Load
    target: Target
    runs: list[Run] = field(default_factory=list)
    busy_cores_before: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(answer.num_tokens for run in self.runs for answer in run.answers)

    def rows(self) -> list[Row]:
        client_cpu_s = sum(run.client_cpu_s for run in self.runs)
        return [
            Row(
                target=self.target.name,
                load=self.load.name,
                phase=phase,
                figures=figures_of([run.windows[phase] for run in self.runs]),
                tokens_per_s_by_repeat=tuple(
                    figures_of([run.windows[phase]]).output_tokens_per_s for run in self.runs
                ),
                client_cpu_us_per_token=client_cpu_s / max(1, self.num_tokens) * 1e6,
                busy_cores_before=self.busy_cores_before,
            )
            for phase in self.runs[0].windows
        ]

    def cost(self) -> Cost:
        return Cost(
            target=self.target.name,
            load=self.load.name,
            cpu_s=total_of([run.server_cpu_s for run in self.runs]),
            num_requests=sum(len(run.answers) for run in self.runs),
            num_tokens=self.num_tokens,
        )


async def compare(
    targets: Sequence[Target],
    loads: Sequence[Load],
    *,
    tokens: TokenRange,
    seed: int,
    num_repeats: int,
    say: Callable[[str], None],
    on_rows: Callable[[list[Row]], None],
) -> list[Trials]:
    """Play each load on every target before the next; every other repeat in reverse order.

    `on_rows` gets the rows of a load as soon as all targets have played it.
    """
    all_trials: list[Trials] = []
    for load in loads:
        trials = [Trials(load=load, target=target) for target in targets]
        for repeat in range(num_repeats):
            for trial in trials if repeat % 2 == 0 else reversed(trials):
                say(f"{load.name} on {trial.target.name} ({repeat + 1} of {num_repeats}): {load}")
                trial.busy_cores_before = max(trial.busy_cores_before, await _busy_cores())
                trial.runs.append(await Driver(trial.target, tokens).play(load, seed=seed + repeat))
        on_rows([row for trial in trials for row in trial.rows()])
        all_trials += trials
    return all_trials


async def _busy_cores() -> float:
    """Cores that this machine keeps busy while no load of ours is running."""
    await asyncio.sleep(SETTLE_S)
    psutil.cpu_percent()
    await asyncio.sleep(SAMPLE_S)
    return psutil.cpu_percent() / 100 * (psutil.cpu_count() or 1)
