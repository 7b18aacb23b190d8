"""Starts a task on every rank of a layout, each in a process; rank 0 prints what it found."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
import torch
from torch._C._distributed_c10d import TCPStore

from engine.parallel import ParallelLayout, RankEnvironment
from engine.runtime.core_share import split_cores

Result = TypeVar("Result")

_TIMEOUT_S = 600.0


class RanksFailedError(RuntimeError):
    """A rank ended with an error, which it has printed."""


def run_on_ranks(layout: ParallelLayout, task: msgspec.Struct, result: type[Result]) -> Result:
    """Run `task` on all ranks (see `benchmarks.ranks.__main__`); returns what rank 0 found.

    Raises:
        RanksFailedError: one of them failed.
        subprocess.TimeoutExpired: they take too long; all are dead by then.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: list[subprocess.Popen[bytes]] = []
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
            command = [sys.executable, "-m", "benchmarks.ranks", msgspec.json.encode(task).decode()]
            environment = {**os.environ, **place.variables()}
            output = subprocess.PIPE if rank == 0 else None
            ranks.append(subprocess.Popen(command, env=environment, stdout=output))
        output_bytes, _ = ranks[0].communicate(timeout=_TIMEOUT_S)
        if any(process.wait(30) for process in ranks):
            raise RanksFailedError(f"a rank of {layout} failed at {type(task).__name__}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return msgspec.json.decode(output_bytes, type=result)


def take_own_cores(rank: int, num_ranks: int) -> int:
    """Keep this process on its share of the cores; returns its threads."""
    own = split_cores(sorted(os.sched_getaffinity(0)), num_ranks)[rank]
    os.sched_setaffinity(0, own)
    torch.set_num_threads(len(own))
    return len(own)


def device_of_rank(name: str, local_rank: int) -> torch.device:
    """The CPU, or one of the CUDA devices for each rank.

    Raises:
        ValueError: there are fewer devices than ranks.
    """
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"rank {local_rank} has none of the {torch.cuda.device_count()} devices")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def text_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns as wide as they must be; the first one stands left, figures right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
