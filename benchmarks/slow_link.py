"""Handovers between two network namespaces over a slow link with delay, stalls, cuts and damage.

python -m benchmarks.slow_link [--quick] [--json FILE]    # needs root, ip and tc

A veth pair joins the namespaces; a token bucket holds it to 200 Mbit/s. A relay adds 10 ms each
way and lets one thing happen to the data connection, somewhere in the middle of the first prompt.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from benchmarks.moving.namespaces import HOSTS, Link, are_possible, slow_link
from benchmarks.moving.slow_layout import LAYOUT

MBIT_PER_S = 200
GRPC_PORT, DATA_PORT = 7000, 7001
NUM_TOKENS = 512
NUM_HANDOVERS = 2


@dataclass(frozen=True, slots=True)
class Condition:
    name: str
    relay: tuple[str, ...] = ()
    """Options of the relay."""


_MIDDLE = ("--after-bytes", str(5_000_000))
CONDITIONS = (
    Condition("200 Mbit/s", ("--delay-ms", "0")),
    Condition("and 10 ms each way"),
    Condition("and a stall of 2 s", ("--fault", "stall", "--stall-s", "2", *_MIDDLE)),
    Condition("and a stall of 12 s", ("--fault", "stall", "--stall-s", "12", *_MIDDLE)),
    Condition("and a cut", ("--fault", "cut", *_MIDDLE)),
    Condition("and a flipped bit", ("--fault", "flip", *_MIDDLE)),
)
QUICK = tuple(CONDITIONS[index] for index in (1, 4, 5))


@dataclass(frozen=True, slots=True)
class Row:
    """What became of one prompt."""

    condition: str
    prompt: int
    outcome: str
    seconds: float
    link_share: float
    """Of the time that the bytes need at the link's rate, framing not counted."""
    retransfers: list[str]
    is_intact: bool
    """The receiver has what was sent."""
    error: str


def measure(condition: Condition) -> list[Row]:
    """In namespaces of its own."""
    module = [sys.executable, "-m"]
    with slow_link(MBIT_PER_S) as link:
        receiver = _started(
            link,
            link.far,
            [
                *(*module, "benchmarks.moving.receiver", "--layout", json.dumps(asdict(LAYOUT))),
                *("--address", f"{HOSTS[1]}:{GRPC_PORT}", "--data-address", f"0.0.0.0:{DATA_PORT}"),
                "--digests",
            ],
        )
        ports = (str(GRPC_PORT), str(DATA_PORT))
        relay = _started(
            link,
            link.near,
            [*module, "benchmarks.moving.relay", HOSTS[1], *ports, *condition.relay],
        )
        address = f"127.0.0.1:{GRPC_PORT}"
        sender = [*module, "benchmarks.moving.slow_sender", address, str(NUM_TOKENS)]
        said = subprocess.run(
            link.inside(link.near, [*sender, str(NUM_HANDOVERS)]),
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        ).stdout.splitlines()
        relay.communicate()
        arrived = set(receiver.communicate()[0].splitlines())
    return [
        _row(condition, prompt, json.loads(line), is_intact=digest in arrived)
        for prompt, (line, digest) in enumerate(zip(said[::2], said[1::2], strict=True))
    ]


def _row(condition: Condition, prompt: int, said: dict[str, object], *, is_intact: bool) -> Row:
    seconds = float(str(said["seconds"]))
    num_bits = 8 * NUM_TOKENS * LAYOUT.bytes_per_token
    return Row(
        condition.name,
        prompt,
        str(said["outcome"]),
        seconds,
        num_bits / (MBIT_PER_S * 1e6) / seconds,
        list(said["retransfers"]),  # type: ignore[call-overload]
        is_intact,
        str(said["error"]),
    )


def _started(link: Link, name: str, command: list[str]) -> "subprocess.Popen[str]":
    """Returns once it has said its first line."""
    process = subprocess.Popen(
        link.inside(name, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline(), f"{command} did not start"
    return process


def table(rows: Sequence[Row]) -> str:
    """A line a prompt, as Markdown."""
    lines = ["| link | prompt | outcome | s | of the link's rate | written again | bytes |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row.condition} | {row.prompt + 1} | {row.error or row.outcome} | {row.seconds:.2f} |"
        f" {row.link_share:.0%} | {', '.join(row.retransfers) or '-'} |"
        f" {'intact' if row.is_intact else 'not there'} |"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slow_link", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer conditions")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    if not are_possible():
        print("network namespaces cannot be made here: root, ip and tc are needed")
        return 1
    rows = [row for some in (QUICK if options.quick else CONDITIONS) for row in measure(some)]
    print(table(rows))
    if options.json is not None:
        options.json.write_bytes(msgspec.json.encode([asdict(row) for row in rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
