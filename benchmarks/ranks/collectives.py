"""What one collective costs, by size and by how its bytes travel."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import torch

from benchmarks.ranks.processes import device_of_rank, run_on_ranks, take_own_cores, text_table
from engine.parallel import (
    Axis,
    AxisGroup,
    CollectivesConfig,
    ParallelLayout,
    RankEnvironment,
    join_group,
)

SIZES_BYTES = (2 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
TARGET_US = 60.0
"""For all of up to TARGET_BYTES over shared memory, when each rank has a core."""
TARGET_BYTES = 64 << 10
_DTYPE = torch.bfloat16
_TRANSPORTS = {"cpu": ("shm", "gloo"), "cuda": ("nccl",)}


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


class CollectivesTask(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Every size and operation over one transport."""

    num_ranks: int
    transport: str
    device: str
    is_quick: bool

    def run(self, place: RankEnvironment) -> list[CollectiveRow]:
        layout = ParallelLayout(tp=self.num_ranks)
        config = CollectivesConfig(has_shared_memory=self.transport == "shm")
        device = device_of_rank(self.device, place.local_rank)
        with join_group(layout, place, config=config, device=device) as group:
            take_own_cores(place.rank, layout.num_ranks)
            rows = _timed(group.axes.tp, group.transports[Axis.TP], device, is_quick=self.is_quick)
            group.axes.world.barrier()
        return rows


def measure_collectives(num_ranks: int, device: str, *, is_quick: bool) -> list[CollectiveRow]:
    """All transports of a device, one after the other."""
    rows: list[CollectiveRow] = []
    for transport in _TRANSPORTS[device]:
        task = CollectivesTask(
            num_ranks=num_ranks, transport=transport, device=device, is_quick=is_quick
        )
        rows += run_on_ranks(ParallelLayout(tp=num_ranks), task, list[CollectiveRow])
    return rows


def collectives_table(rows: Sequence[CollectiveRow]) -> str:
    """One line a collective and size, transports side by side, and the verdict below."""
    transports = list(dict.fromkeys(row.transport for row in rows))
    found = {(row.operation, row.num_bytes, row.transport): row for row in rows}
    lines = []
    for operation, num_bytes in dict.fromkeys((row.operation, row.num_bytes) for row in rows):
        cells = (found[operation, num_bytes, transport] for transport in transports)
        figures = (f"{row.median_us:.0f} / {row.p90_us:.0f}" for row in cells)
        lines.append([f"{operation} {num_bytes >> 10} KB", *figures])
    text = text_table(["collective", *(f"{name} p50 / p90 us" for name in transports)], lines)
    small = [row for row in rows if row.transport == "shm" and row.num_bytes <= TARGET_BYTES]
    if small:
        slowest = max(row.median_us for row in small)
        is_met = "met" if slowest <= TARGET_US else "not met"
        text += (
            f"\nshm, up to {TARGET_BYTES >> 10} KB: at most {slowest:.0f} us, "
            f"target {TARGET_US:.0f}: {is_met}"
        )
    return text


def _timed(
    axis: AxisGroup, transport: str, device: torch.device, *, is_quick: bool
) -> list[CollectiveRow]:
    rows = []
    for num_bytes in SIZES_BYTES:
        num_items = num_bytes // _DTYPE.itemsize // axis.size * axis.size
        x = torch.ones(num_items, dtype=_DTYPE, device=device)
        num_calls = max(10, min(2000, (64 << 20) // num_bytes) // (5 if is_quick else 1))
        for name, call in _calls(axis, x).items():
            for _ in range(10):
                call()
            axis.barrier()
            times_us = []
            for _ in range(num_calls):
                start_s = time.perf_counter()
                call()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                times_us.append((time.perf_counter() - start_s) * 1e6)
            p90_us = statistics.quantiles(times_us, n=10)[-1]
            median_us = statistics.median(times_us)
            rows.append(CollectiveRow(transport, axis.size, name, num_bytes, median_us, p90_us))
    return rows


def _calls(axis: AxisGroup, x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    part = len(x) // axis.size
    return {
        "all_reduce": lambda: axis.all_reduce(x),
        "all_gather": lambda: axis.all_gather(x[:part]),
        "all_to_all": lambda: axis.all_to_all(x, [part] * axis.size, [part] * axis.size),
    }
