"""CPU time of a mesh's processes, to see where a load's cost falls."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from deploy.launcher.ready_file import read_state_file

CpuMeter = Callable[[], Mapping[str, float]]
"""CPU seconds used since start, by the name of each process."""


def no_meter() -> Mapping[str, float]:
    """For a target whose processes we do not know."""
    return {}


def meter_of_state_file(path: Path) -> CpuMeter:
    """Meter the processes of the mesh whose launcher wrote `path`; ones that end fall out."""
    pids = {process.name: process.pid for process in read_state_file(path)}

    def read() -> Mapping[str, float]:
        return {name: used for name, pid in pids.items() if (used := _cpu_s(pid)) is not None}

    return read


def used_between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """CPU seconds of each process that was there at both readings."""
    return {name: after[name] - before[name] for name in before if name in after}


def total_of(runs: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Sum the seconds of each process over several runs."""
    total: Counter[str] = Counter()
    for run in runs:
        total.update(run)
    return dict(total)


def _cpu_s(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)
