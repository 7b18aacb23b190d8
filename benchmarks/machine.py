"""What the host can do at most: how fast it reads memory and multiplies matrices.

python -m benchmarks.machine
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

MATRIX_SIZE = 2048
READ_BYTES = 256 << 20
"""Larger than the caches that one core fills."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineRates:
    """Medians of a few runs, taken moments before what is held against them."""

    num_threads: int
    read_gb_per_s: float
    matrix_gflop_per_s: float


class MachineProbe:
    """Keeps its operands, so that a probe between two measurements takes a fraction of a second."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._left = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
        self._right = torch.randn(MATRIX_SIZE, MATRIX_SIZE).to(dtype)
        self._memory = torch.zeros(READ_BYTES // 4)

    def rates(self, num_threads: int, num_runs: int = 7) -> MachineRates:
        """Measure now; leaves torch's thread count as it found it."""
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            read_s = median_s(self._memory.sum, num_runs)
            multiply_s = median_s(lambda: self._left @ self._right, num_runs)
        finally:
            torch.set_num_threads(before)
        return MachineRates(
            num_threads=num_threads,
            read_gb_per_s=READ_BYTES / read_s / 1e9,
            matrix_gflop_per_s=2 * MATRIX_SIZE**3 / multiply_s / 1e9,
        )


def median_s(call: Callable[[], object], num_runs: int) -> float:
    """Median time of a call, after one that does not count."""
    call()
    times_s = []
    for _ in range(num_runs):
        start_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - start_s)
    return statistics.median(times_s)


def main() -> None:
    """Print the rates of one thread and of all cores' threads."""
    most = torch.get_num_threads()
    for dtype in (torch.bfloat16, torch.float32):
        probe = MachineProbe(dtype)
        for num_threads in sorted({1, most}):
            rates = probe.rates(num_threads)
            print(
                f"{dtype}, {num_threads} threads: memory read {rates.read_gb_per_s:.1f} GB/s, "
                f"matrix product {rates.matrix_gflop_per_s:.0f} GFLOP/s"
            )


if __name__ == "__main__":
    main()
