"""What a whole run of the serving benchmark found; this is what its JSON file holds."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.load.figures import Figures

FORMAT = "isthmus-serving-1"


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Where it ran; ratios of one run travel between machines, absolute figures do not."""

    cpu: str
    num_cores: int
    python: str

    @classmethod
    def this(cls) -> "Machine":
        return cls(
            cpu=_cpu_name(),
            num_cores=len(os.sched_getaffinity(0)),
            python=platform.python_version(),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """The figures of one phase of a load on one target, repeats pooled."""

    target: str
    load: str
    phase: str
    """The load's name again, or it with "alone", "disturbed" or "prompts"."""
    figures: Figures
    tokens_per_s_by_repeat: tuple[float, ...]
    client_cpu_us_per_token: float
    """Of the whole load, not only this phase: what the measuring took from the servers' cores."""
    busy_cores_before: float
    """Cores in use just before the load began, the most of any repeat: others' work, or a peer
    that spins while idle. What is not near 0 is noise in the figures."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """CPU seconds that one load took of a target's processes, repeats together."""

    target: str
    load: str
    cpu_s: dict[str, float]
    """By process; empty where they are not known."""
    num_requests: int
    num_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A claim with the number that decides it."""

    target: str
    claim: str
    value: float | None
    """None where one side has no figure; such a claim is not met."""
    is_met: bool

    def __str__(self) -> str:
        """One line for people."""
        word = "met" if self.is_met else "not met"
        number = "no figure" if self.value is None else f"{self.value:.3g}"
        return f"{self.target}: {self.claim}: {number}: {word}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """A run of all loads on all targets."""

    format: str = FORMAT
    started_at: str
    seed: int
    is_quick: bool
    num_repeats: int
    machine: Machine
    targets: dict[str, str]
    """Model by name of target."""
    loads: dict[str, str]
    """Each load in words, by name."""
    rows: tuple[Row, ...]
    costs: tuple[Cost, ...]
    verdicts: tuple[Verdict, ...]


def write_outcome(path: Path, outcome: Outcome) -> None:
    """Write indented JSON; a figure without samples is null."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(outcome), indent=2) + b"\n")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
