"""Why a group of ranks is over: one verdict, the first that any of its ranks came to."""

from enum import IntEnum

import msgspec

from engine.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    RankDeadError,
    RankGroupError,
)


class VerdictKind(IntEnum):
    """Numbers as in rank_wait.c."""

    DEAD = 1
    TIMED_OUT = 2
    ABORTED = 3
    LEFT = 4


class Verdict(msgspec.Struct, frozen=True):
    """What all ranks raise, each with the operation that it was in."""

    kind: VerdictKind
    rank: int | None
    """Global rank to blame; None where it is not known."""
    reason: str = ""
    """Given with an abort."""

    def error(self, operation: str, timeout_s: float) -> RankGroupError:
        """In words, for a rank that was in `operation`."""
        name = "a rank" if self.rank is None else f"rank {self.rank}"
        if self.kind is VerdictKind.DEAD:
            text = f"{operation}: {name} is dead"
            return RankDeadError(text, rank=self.rank, operation=operation)
        if self.kind is VerdictKind.LEFT:
            text = f"{operation}: {name} has left the group"
            return RankDeadError(text, rank=self.rank, operation=operation)
        if self.kind is VerdictKind.TIMED_OUT:
            text = f"{operation}: {name} did not come within {timeout_s:g} s"
            return CollectiveTimeoutError(text, rank=self.rank, operation=operation)
        text = f"{operation}: {name} called the group off: {self.reason}"
        return CollectiveAbortedError(text, rank=self.rank, operation=operation)
