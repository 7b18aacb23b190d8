"""Ranks of one worker on this host: what their collectives cost, by size and by transport.

python -m benchmarks.parallel
python -m benchmarks.parallel --quick --ranks 4
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from torch._C._distributed_c10d import TCPStore

from engine.parallel import (
    AxisGroup,
    CollectivesConfig,
    ParallelLayout,
    RankEnvironment,
    RankGroup,
    join_group,
)

FORMAT = "isthmus-parallel-1"
SIZES_BYTES = (2 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
TARGET_US = 60.0
"""For all of up to TARGET_BYTES over shared memory, when each rank has a core."""
TARGET_BYTES = 64 << 10
_DTYPE = torch.bfloat16
_TRANSPORTS = ("shm", "gloo")


@dataclass(frozen=True, slots=True)
class CollectiveRow:
    """One collective of one size, back to back, as rank 0 sees it."""

    transport: str
    num_ranks: int
    operation: str
    num_bytes: int
    """Of each rank's tensor; bfloat16."""
    median_us: float
    p90_us: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the program writes; one field for each table."""

    format: str
    num_cores: int
    collectives: list[CollectiveRow]


@contextmanager
def started_ranks(
    layout: ParallelLayout, arguments: Sequence[str]
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Run this program once for each rank of `layout`; rank 0's output is to be read."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = []
    try:
        for rank in range(layout.num_ranks):
            place = RankEnvironment(
                rank=rank,
                world_size=layout.num_ranks,
                local_rank=rank,
                master_address="127.0.0.1",
                master_port=store.port,
                is_store_elsewhere=True,
            )
            command = [sys.executable, "-m", "benchmarks.parallel", *arguments]
            environment = {**os.environ, **place.variables(), "OMP_NUM_THREADS": "1"}
            output = subprocess.PIPE if rank == 0 else None
            ranks.append(subprocess.Popen(command, env=environment, stdout=output))
        yield ranks
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def measure_collectives(transport: str, num_ranks: int, *, is_quick: bool) -> list[CollectiveRow]:
    """Start the ranks and collect what rank 0 found."""
    layout = ParallelLayout(tp=num_ranks)
    arguments = ["--as-rank", transport, "--ranks", str(num_ranks)]
    with started_ranks(layout, [*arguments, *(["--quick"] if is_quick else [])]) as ranks:
        output, _ = ranks[0].communicate(timeout=600)
        if any(process.wait(30) for process in ranks):
            raise RuntimeError(f"a rank of {transport} failed")
    return msgspec.json.decode(output, type=list[CollectiveRow])


def time_collectives(group: RankGroup, *, is_quick: bool) -> list[CollectiveRow]:
    """What each rank runs."""
    axis = group.axes.tp
    rows = []
    for num_bytes in SIZES_BYTES:
        x = torch.ones(num_bytes // _DTYPE.itemsize // axis.size * axis.size, dtype=_DTYPE)
        num_calls = max(10, min(2000, (64 << 20) // num_bytes) // (5 if is_quick else 1))
        for name, call in _calls(axis, x).items():
            for _ in range(10):
                call()
            axis.barrier()
            times_us = []
            for _ in range(num_calls):
                start_s = time.perf_counter()
                call()
                times_us.append((time.perf_counter() - start_s) * 1e6)
            rows.append(
                CollectiveRow(
                    transport=group.transports["tp"],  # type: ignore[index]
                    num_ranks=axis.size,
                    operation=name,
                    num_bytes=num_bytes,
                    median_us=statistics.median(times_us),
                    p90_us=statistics.quantiles(times_us, n=10)[-1],
                )
            )
    return rows


def _calls(axis: AxisGroup, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    part = len(x) // axis.size
    return {
        "all_reduce": lambda: axis.all_reduce(x),
        "all_gather": lambda: axis.all_gather(x[:part]),
        "all_to_all": lambda: axis.all_to_all(x, [part] * axis.size, [part] * axis.size),
    }


def table(rows: Sequence[CollectiveRow]) -> str:
    """One line a collective and size, transports side by side, and the verdict below."""
    transports = list(dict.fromkeys(row.transport for row in rows))
    found = {(row.operation, row.num_bytes, row.transport): row for row in rows}
    head = "".join(f" {f'{name} p50 / p90 us':>22}" for name in transports)
    lines = [f"{'collective':<11} {'KB':>5}{head}"]
    for operation, num_bytes in dict.fromkeys((row.operation, row.num_bytes) for row in rows):
        cells = (found[operation, num_bytes, transport] for transport in transports)
        figures = "".join(f" {f'{row.median_us:.0f} / {row.p90_us:.0f}':>22}" for row in cells)
        lines.append(f"{operation:<11} {num_bytes >> 10:>5}{figures}")
    small = [row for row in rows if row.transport == "shm" and row.num_bytes <= TARGET_BYTES]
    if small:
        slowest = max(row.median_us for row in small)
        is_met = "met" if slowest <= TARGET_US else "not met"
        lines.append(
            f"shm, up to {TARGET_BYTES >> 10} KB: at most {slowest:.0f} us, "
            f"target {TARGET_US:.0f}: {is_met}"
        )
    return "\n".join(lines)


def run_as_rank(transport: str, *, is_quick: bool) -> None:
    """Measure as one of the ranks; rank 0 prints rows as JSON."""
    environment = RankEnvironment.read(os.environ)
    assert environment is not None, "started without a rank"
    torch.set_num_threads(1)
    layout = ParallelLayout(tp=environment.world_size)
    config = CollectivesConfig(has_shared_memory=transport == "shm")
    cores = sorted(os.sched_getaffinity(0))
    with join_group(layout, environment, config=config) as group:
        os.sched_setaffinity(0, {cores[environment.local_rank % len(cores)]})
        rows = time_collectives(group, is_quick=is_quick)
        group.axes.world.barrier()
    if environment.rank == 0:
        sys.stdout.buffer.write(msgspec.json.encode(rows))


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--ranks", type=int, default=2, help="2 by default")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--as-rank", choices=_TRANSPORTS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.as_rank is not None:
        run_as_rank(options.as_rank, is_quick=options.quick)
        return 0
    num_cores = len(os.sched_getaffinity(0))
    rows = []
    for transport in _TRANSPORTS:
        rows += measure_collectives(transport, options.ranks, is_quick=options.quick)
    print(f"{options.ranks} ranks, {num_cores} cores")
    print(table(rows))
    if options.json is not None:
        outcome = Outcome(FORMAT, num_cores, rows)
        options.json.write_bytes(msgspec.json.encode(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
