"""Which cores the workers of one host get, and what keeps their threads within them.

The rule of sharing is in `engine.runtime.core_share` and docs/decisions/0003-core-sharing.md.
"""

import os
from pathlib import Path

_NUM_KNOWN_CORES = 64


def usable_cores() -> tuple[int, ...]:
    """Cores that this process may run on, cut to the CPU quota of its cgroup where it has one.

    The shared flags know cores 0 to 63; what a larger host has beyond them is left alone.
    """
    cores = tuple(core for core in sorted(os.sched_getaffinity(0)) if core < _NUM_KNOWN_CORES)
    quota = _cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    return cores if quota is None else cores[: max(1, int(quota))]


def _cgroup_quota(cpu_max: Path) -> float | None:
    """Cores' worth of time that cgroup v2 grants; None without a limit."""
    try:
        limit, period = cpu_max.read_text().split()
        return None if limit == "max" else float(limit) / float(period)
    except (OSError, ValueError):
        return None


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
