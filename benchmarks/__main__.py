"""`make bench`: every benchmark, one after the other, each writing a JSON file.

python -m benchmarks                                       # all of them
python -m benchmarks --target vllm=http://127.0.0.1:8001   # a peer beside the mesh
python -m benchmarks --only serving --quick -- --decode 2  # after --: options of `isthmus up`
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NAMES = ("engine", "kv_precision", "kv_transfer", "parallel", "gateway", "serving")


def commands(options: argparse.Namespace, mesh_arguments: Sequence[str]) -> dict[str, list[str]]:
    """The command line of each benchmark chosen, by name; each is a process of its own.

    So one's threads and memory cannot touch the other's figures.
    """
    names = options.only or NAMES
    found = {
        name: [
            sys.executable,
            "-m",
            f"benchmarks.{name}",
            "--json",
            str(options.out / f"{name}.json"),
        ]
        for name in names
    }
    if options.quick:
        for command in found.values():
            command.append("--quick")
    if serving := found.get("serving"):
        serving.append("--start")
        for target in options.target:
            serving += ["--target", target]
        serving += ["--", *mesh_arguments]
    return found


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; leaves the process on a bad one, as argparse does."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Run all benchmarks.")
    parser.add_argument("--only", action="append", choices=NAMES, help="repeat; all by default")
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    parser.add_argument("--target", action="append", default=[], metavar="NAME=URL")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="FOLDER")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run what was asked for; a benchmark that fails does not keep the next one from running."""
    split = arguments.index("--") if "--" in arguments else len(arguments)
    options = parsed(arguments[:split])
    options.out.mkdir(parents=True, exist_ok=True)
    worst = 0
    for name, command in commands(options, arguments[split + 1 :]).items():
        print(f"== {name}", flush=True)
        worst = max(worst, abs(subprocess.run(command, check=False).returncode))
    print(f"figures are in {options.out}")
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
