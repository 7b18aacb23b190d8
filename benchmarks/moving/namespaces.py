"""Two network namespaces joined by a slow link; needs root, `ip` and `tc`."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass

HOSTS = ("10.203.77.1", "10.203.77.2")


@dataclass(frozen=True, slots=True)
class Link:
    """Names of the namespaces at both ends."""

    near: str
    far: str

    def inside(self, name: str, command: list[str]) -> list[str]:
        """The command line that runs `command` in a namespace."""
        return ["ip", "netns", "exec", name, *command]


def are_possible() -> bool:
    """Whether this process may make namespaces, and the tools are there."""
    if os.geteuid() != 0 or not all(shutil.which(tool) for tool in ("ip", "tc")):
        return False
    name = f"isthmus-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True)
    subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
    return made.returncode == 0


@contextmanager
def slow_link(mbit_per_s: int) -> Iterator[Link]:
    """Both directions have that rate, with 50 ms of queue; all is gone after the block."""
    link = Link(*(f"isthmus-{end}-{os.getpid()}" for end in ("near", "far")))
    devices = tuple(f"isth{end}{os.getpid() % 100000}" for end in "ab")
    with ExitStack() as stack:
        for name in (link.near, link.far):
            _run("ip", "netns", "add", name)
            stack.callback(_try, "ip", "netns", "del", name)
        _run("ip", "link", "add", devices[0], "type", "veth", "peer", "name", devices[1])
        for name, device, host in zip((link.near, link.far), devices, HOSTS, strict=True):
            _run("ip", "link", "set", device, "netns", name)
            _run(*link.inside(name, ["ip", "address", "add", f"{host}/30", "dev", device]))
            for up in (device, "lo"):
                _run(*link.inside(name, ["ip", "link", "set", up, "up"]))
            bucket = ["tbf", "rate", f"{mbit_per_s}mbit", "burst", "64kb", "latency", "50ms"]
            _run(*link.inside(name, ["tc", "qdisc", "add", "dev", device, "root", *bucket]))
        yield link


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def _try(*command: str) -> None:
    with suppress(subprocess.CalledProcessError):
        _run(*command)
