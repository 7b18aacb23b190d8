"""How fast KV blocks get from one process to another, beside what others make of the same host.

python -m benchmarks.kv_transfer [--quick] [--json FILE] [--model PATH|demo] [--only planes]

Blocks of 4 KiB to 1 MiB, 1 to 4 096 of them, scattered over the pools of two processes: by our
data planes; by NIXL, where it is installed, as it likes and limited to TCP, writing or reading,
whichever is faster; through a plain TCP socket and by a memory copy, both in one piece. Then what
of a handover over tcp a prompt has to wait for, prefill on one core and the receiver on another.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import msgspec

from benchmarks.moving.comparison import overlap_table, rate_table, verdicts
from benchmarks.moving.figure import Figure, Overlap

FORMAT = "isthmus-kv-transfer-benchmark-3"
OURS = ("memory copy", "shm", "plain socket", "tcp")
NIXL = ("NIXL write", "NIXL read")
NIXL_TCP = ("NIXL write, tcp", "NIXL read, tcp")


def measured_rates(*, is_quick: bool) -> Iterator[Figure]:
    """All ways, each in processes of its own."""
    has_nixl = find_spec("nixl_cu12") is not None
    for way in OURS + (NIXL + NIXL_TCP if has_nixl else ()):
        print(f"{way} ...", file=sys.stderr, flush=True)
        environment = {"UCX_TLS": "tcp,self"} if way in NIXL_TCP else {}
        lines = _lines_of("near", way, is_quick=is_quick, environment=environment)
        yield from (msgspec.json.decode(line, type=Figure) for line in lines)


def measured_overlap(model: str, *, is_quick: bool) -> list[Overlap]:
    """Each prompt length."""
    print("handovers beside prefill ...", file=sys.stderr, flush=True)
    lines = _lines_of("overlap", "--model", model, is_quick=is_quick, environment={})
    return [msgspec.json.decode(line, type=Overlap) for line in lines]


def _lines_of(
    module: str, *arguments: str, is_quick: bool, environment: dict[str, str]
) -> Iterator[str]:
    command = [sys.executable, "-m", f"benchmarks.moving.{module}", *arguments]
    done = subprocess.run(
        [*command, *(["--quick"] if is_quick else [])],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        if line.startswith("{"):  # libraries may talk, too
            yield line


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_transfer", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer runs, no case above 64 MiB")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--model", default="demo", help="a path, or demo")
    parser.add_argument("--only", choices=("planes", "overlap"))
    options = parser.parse_args(arguments)
    figures = [] if options.only == "overlap" else list(measured_rates(is_quick=options.quick))
    overlaps = (
        [] if options.only == "planes" else measured_overlap(options.model, is_quick=options.quick)
    )
    for text in (rate_table(figures), overlap_table(overlaps), verdicts(figures, overlaps)):
        if text:
            print(text, end="\n\n")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        found = {
            "format": FORMAT,
            "figures": [asdict(figure) for figure in figures],
            "overlaps": [asdict(overlap) for overlap in overlaps],
        }
        options.json.write_bytes(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
