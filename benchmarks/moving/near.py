"""One way, all cases: a process of its own, for libraries that read their environment once.

python -m benchmarks.moving.near WAY [--quick]    # prints a JSON line for each case
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby

from benchmarks.moving.case import POOL_BYTES, QUICK_BYTES, Case, cases, scattered
from benchmarks.moving.figure import Figure
from benchmarks.moving.ways import FarProcess, MemoryCopy, Move, PlainSocket, Plane, Way
from kv_transfer.config import Checksums, DataPlane

MIN_RUNS = 3
MAX_RUNS = 200


def way_named(name: str) -> Way:
    """Of `WAYS` in `benchmarks.kv_transfer`."""
    match name.partition(",")[0]:
        case "memory copy":
            return MemoryCopy()
        case "plain socket":
            return PlainSocket()
        case "shm" | "tcp" | "nixl" as plane:
            is_bare = name.endswith("no checksums")
            checksums = Checksums.NEVER if is_bare else Checksums.NETWORK
            return Plane(DataPlane(plane), checksums)
        case "NIXL write" | "NIXL read" as nixl:
            from benchmarks.moving.nixl_way import Nixl  # only where it is installed

            return Nixl(nixl.partition(" ")[2].upper())
        case _:
            raise ValueError(f"no way {name!r}")


def measure(name: str, *, limit_s: float, most_bytes: int) -> Iterator[Figure]:
    """Each case for at most `limit_s`, or MIN_RUNS.

    The plain socket and our tcp have the same two cores, one for each end, as two hosts would: on
    one core they would take turns, and no one would have to be woken. NIXL runs where it likes:
    kept on one core its threads stand in each other's way.
    """
    way = way_named(name)
    cores = sorted(os.sched_getaffinity(0))
    is_placed = name.startswith(("plain socket", "tcp"))
    if is_placed:
        os.sched_setaffinity(0, cores[:1])
    with FarProcess(cores[-1:] if is_placed else cores) as far:
        for block_bytes, some in groupby(cases(most_bytes), key=lambda case: case.block_bytes):
            with ExitStack() as stack:
                move = way.open(far, block_bytes, stack)
                for case in some:
                    yield _measured(name, case, move, far, limit_s)


def _measured(name: str, case: Case, move: Move, far: FarProcess, limit_s: float) -> Figure:
    here, there = scattered(case, 1), scattered(case, 2)
    for _ in range(2):
        move(case, next(here), next(there))()
    seconds: list[float] = []
    far_s, near_s = far.cpu_s, time.process_time()
    end_s = time.perf_counter() + limit_s
    while len(seconds) < MIN_RUNS or (len(seconds) < MAX_RUNS and time.perf_counter() < end_s):
        moving = move(case, next(here), next(there))
        start_s = time.perf_counter()
        moving()
        seconds.append(time.perf_counter() - start_s)
    cpu_s = time.process_time() - near_s + far.cpu_s - far_s
    return Figure(
        name,
        case.block_bytes,
        case.num_blocks,
        case.num_bytes / statistics.median(seconds) / 1e9,
        case.num_bytes / min(seconds) / 1e9,
        cpu_s / (case.num_bytes * len(seconds) / 1e9),
    )


def main(arguments: Sequence[str]) -> None:
    """Print figures as they come."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving.near", description=__doc__)
    parser.add_argument("way")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    limit_s, most_bytes = (0.05, QUICK_BYTES) if options.quick else (0.2, POOL_BYTES)
    for figure in measure(options.way, limit_s=limit_s, most_bytes=most_bytes):
        print(json.dumps(asdict(figure)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
