"""Where a simulated schedule's luck comes from: everything follows from a seed."""

import random
from dataclasses import dataclass
from enum import StrEnum


class Fault(StrEnum):
    """What may go wrong in a schedule."""

    DELAY = "delay"
    """Messages take up to seconds, so that they overtake each other and come when all is over."""
    DROP = "drop"
    """A request or an answer is lost; its caller hears of a broken connection, or of nothing."""
    DUPLICATE = "duplicate"
    """A request arrives a second time, at any moment later."""
    PARTITION = "partition"
    """Nothing passes between two workers for a time longer than a lease, or shorter."""
    STOP = "stop"
    """A writing thread is not scheduled for long, before a slice or in the middle of one."""
    CUT = "cut"
    """A data connection breaks at any byte; what is on its way already still arrives."""
    STALL = "stall"
    """A data connection moves nothing for a while."""
    CORRUPT = "corrupt"
    """A byte of a data connection arrives changed."""
    ABORT = "abort"
    """The client goes away; both workers are told, or one, at different times."""
    CRASH_SENDER = "crash_sender"
    CRASH_RECEIVER = "crash_receiver"


ALL_FAULTS = frozenset(Fault)


@dataclass(frozen=True, slots=True)
class Plan:
    """One schedule; `run_schedule` gives the same course of events for the same plan."""

    seed: int
    num_requests: int = 5
    faults: frozenset[Fault] = ALL_FAULTS


class Chance:
    """Draws; the same ones whether a fault is allowed or not, so that plans can be compared."""

    def __init__(self, plan: Plan) -> None:
        self._random = random.Random(plan.seed)
        self._faults = plan.faults

    def hits(self, fault: Fault, probability: float) -> bool:
        """Whether a fault happens now."""
        return self._random.random() < probability and fault in self._faults

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._random.random()

    def integer(self, low: int, high: int) -> int:
        """In [low, high]."""
        return low + int(self._random.random() * (high - low + 1))

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        self._faults = frozenset()
