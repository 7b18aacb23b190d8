"""How the processes of one host share its cores. The rule: docs/decisions/0003-core-sharing.md."""

import os
from collections.abc import Sequence
from pathlib import Path


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may run on, cut to the CPU quota of its cgroup where it has one."""
    cores = tuple(sorted(os.sched_getaffinity(0)))
    quota = _cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    return cores if quota is None else cores[: max(1, int(quota))]


def _cgroup_quota(cpu_max: Path) -> float | None:
    """Cores' worth of time that cgroup v2 grants; None without a limit."""
    try:
        limit, period = cpu_max.read_text().split()
        return None if limit == "max" else float(limit) / float(period)
    except (OSError, ValueError):
        return None


def plan_home_cores(cores: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """Split the cores evenly, at least one each; with more workers than cores, some share one.

    The first workers get the remainder: the prefill workers come first, and prefill is the phase
    that more cores make faster.
    """
    if not cores:
        raise ValueError("a host has at least one core, got none")
    if num_workers > len(cores):
        return [(cores[index % len(cores)],) for index in range(num_workers)]
    share, remainder = divmod(len(cores), num_workers)
    homes, start = [], 0
    for index in range(num_workers):
        stop = start + share + (index < remainder)
        homes.append(tuple(cores[start:stop]))
        start = stop
    return homes


def thread_environment(num_threads: int) -> dict[str, str]:
    """Environment of a worker: its thread pools start no larger than this and never spin.

    A spinning OpenMP thread would hold a core that another process of the mesh needs.
    """
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "0",
        "KMP_BLOCKTIME": "0",
        "OMP_DYNAMIC": "FALSE",
        "TOKENIZERS_PARALLELISM": "false",
    }
