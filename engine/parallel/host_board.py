"""What the ranks of one host tell each other about trouble: one verdict, the first that came.

A rank finds the verdict in every call that has to wait, so nobody waits for a group that is over.
"""

import os
import select
from collections.abc import Mapping, Sequence

from engine.parallel.native_group import NativeGroupLibrary
from engine.parallel.verdict import Verdict, VerdictKind

_REASON_BYTES = 499
_ELSEWHERE = 1 << 31
"""Marks a global rank of another host, where else a place on the board stands."""
_UNKNOWN = (1 << 32) - 1


class HostBoard:
    """The board as one rank sees it; places are positions in `ranks`."""

    def __init__(
        self,
        library: NativeGroupLibrary,
        address: int,
        rank: int,
        pids: Mapping[int, int],
    ) -> None:
        """`pids` by global rank, all of this host; `address` is that of the shared board.

        Raises:
            OSError: a process is gone already.
        """
        self.address = address
        self.ranks: Sequence[int] = sorted(pids)
        self._library = library
        self._rank = rank
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

    def verdict(self) -> Verdict | None:
        """What ended the group, if anything did."""
        verdict = self._library.board_verdict(self.address)
        if not verdict:
            return None
        kind, place = VerdictKind(verdict >> 48), verdict >> 32 & 0xFFFF
        blamed = verdict & 0xFFFFFFFF
        rank: int | None = blamed & ~_ELSEWHERE
        if not blamed & _ELSEWHERE:
            rank = self.ranks[blamed]
        elif blamed == _UNKNOWN:
            rank = None
        reason = self._library.board_reason(self.address, place)
        return Verdict(kind, rank, reason.decode(errors="replace"))

    def dead_rank(self) -> int | None:
        """A rank whose process is gone, looked up now."""
        poll = select.poll()
        by_fd = {fd: rank for rank, fd in self.pidfds.items()}
        for fd in by_fd:
            poll.register(fd, select.POLLIN)
        return next((by_fd[fd] for fd, _ in poll.poll(0)), None)

    def abort(self, reason: str) -> None:
        """Call the group off, unless it is over; wakes all ranks of the host."""
        self.post(Verdict(VerdictKind.ABORTED, self._rank, reason))

    def post(self, verdict: Verdict) -> None:
        """Give the verdict unless there is one; wakes all ranks of the host."""
        if verdict.rank is None:
            blamed = _UNKNOWN
        elif verdict.rank in self.ranks:
            blamed = self.place(verdict.rank)
        else:
            blamed = _ELSEWHERE | verdict.rank
        reason = verdict.reason.encode()[:_REASON_BYTES]
        if self._is_open:
            self._library.board_post(
                self.address, self.place(self._rank), verdict.kind, blamed, reason
            )

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
