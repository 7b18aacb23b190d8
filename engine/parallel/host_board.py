"""What the ranks of one host tell each other about trouble: one verdict, the first that came.

A rank finds the verdict in every call that has to wait, so nobody waits for a group that is over.
"""

import os
import select
from collections.abc import Mapping, Sequence
from enum import IntEnum

from engine.errors import (
    CollectiveAbortedError,
    CollectiveTimeoutError,
    RankDeadError,
    RankGroupError,
)
from engine.parallel.native_group import NativeGroupLibrary

_REASON_BYTES = 499


class _Verdict(IntEnum):
    """As in collectives.c."""

    DEAD = 1
    TIMED_OUT = 2
    ABORTED = 3
    LEFT = 4


class HostBoard:
    """The board as one rank sees it; places are positions in `ranks`."""

    def __init__(
        self,
        library: NativeGroupLibrary,
        address: int,
        rank: int,
        pids: Mapping[int, int],
        timeout_s: float,
    ) -> None:
        """`pids` by global rank, all of this host; `address` is that of the shared board.

        Raises:
            OSError: a process is gone already.
        """
        self.address = address
        self.ranks: Sequence[int] = sorted(pids)
        self._library = library
        self._rank = rank
        self._pids = pids
        self._timeout_s = timeout_s
        self._is_open = True
        self.pidfds: dict[int, int] = {}
        """By global rank, of the other ranks: readable once the process is gone."""
        try:
            for other in self.ranks:
                if other != rank:
                    self.pidfds[other] = os.pidfd_open(pids[other])
        except OSError:
            self._close_pidfds()
            raise

    def place(self, rank: int) -> int:
        return self.ranks.index(rank)

    def verdict(self, operation: str) -> RankGroupError | None:
        """What ended the group, in words for a rank that was doing `operation`."""
        verdict = self._library.board_verdict(self.address)
        if not verdict:
            return None
        kind, place = _Verdict(verdict >> 32), verdict & 0xFFFFFFFF
        rank = self.ranks[place]
        name = f"rank {rank} (pid {self._pids[rank]})"
        if kind is _Verdict.DEAD:
            text = f"{operation}: {name} is dead"
            return RankDeadError(text, rank=rank, operation=operation)
        if kind is _Verdict.LEFT:
            text = f"{operation}: {name} has left the group"
            return RankDeadError(text, rank=rank, operation=operation)
        if kind is _Verdict.TIMED_OUT:
            text = f"{operation}: {name} did not come within {self._timeout_s:g} s"
            return CollectiveTimeoutError(text, rank=rank, operation=operation)
        reason = self._library.board_reason(self.address, place).decode(errors="replace")
        text = f"{operation}: {name} called the group off: {reason}"
        return CollectiveAbortedError(text, rank=rank, operation=operation)

    def dead_rank(self) -> int | None:
        """A rank whose process is gone, looked up now."""
        poll = select.poll()
        by_fd = {fd: rank for rank, fd in self.pidfds.items()}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        return next((by_fd[fd] for fd, _ in poll.poll(0)), None)

    def abort(self, reason: str) -> None:
        """Give the verdict unless there is one; wakes all ranks of the host."""
        if self._is_open:
            data = reason.encode()[:_REASON_BYTES]
            self._library.board_abort(self.address, self.place(self._rank), data)

    def close(self) -> None:
        """Leave: ranks that wait for this one get an error."""
        if self._is_open:
            self._is_open = False
            self._library.board_leave(self.address, self.place(self._rank))
            self._close_pidfds()

    def _close_pidfds(self) -> None:
        for fd in self.pidfds.values():
            os.close(fd)
        self.pidfds = {}
