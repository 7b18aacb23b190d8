"""Keeps an eye on ranks of other hosts, through the store where all of them met.

Each rank counts up a number there, and how many collectives it has begun. A number that stands
still names a process that is gone or stopped, once something went wrong; by itself it ends nothing.
"""

import logging
import math
import threading
import time
from collections.abc import Sequence

import msgspec
from torch._C._distributed_c10d import Store

from engine.parallel.host_board import HostBoard
from engine.parallel.verdict import Verdict, VerdictKind

logger = logging.getLogger(__name__)

_BEAT_S = 0.25
STALE_S = 2.0
"""A rank whose number stood still for so long is gone or stopped."""


class _Beat(msgspec.Struct, frozen=True):
    count: int
    num_calls: dict[str, int]
    """Collectives begun, by axis."""
    has_left: bool = False


class StoreWatch:
    """One rank's watch: a thread that beats, looks at the others and carries verdicts."""

    def __init__(
        self,
        store: Store,
        rank: int,
        num_ranks: int,
        *,
        keeper: int | None = None,
        board: HostBoard | None = None,
    ) -> None:
        """Begin to beat; returns when all ranks do.

        Args:
            store: a connection that nobody else uses.
            rank: global.
            num_ranks: of the worker.
            keeper: the rank whose process the store is in, if any's.
            board: verdicts go from the store to it, and from it to the store.
        """
        self.num_calls: dict[str, int] = {}
        """Collectives that this rank has begun, by axis."""
        self._store = store
        self._rank = rank
        self._keeper = keeper
        self._board = board
        self._lock = threading.Lock()
        self._verdict: Verdict | None = None
        self._is_posted = False
        self._beats = [_Beat(0, {})] * num_ranks
        self._changed_s = [time.monotonic()] * num_ranks
        self._answered_s = time.monotonic()
        self._count = 0
        self._wake = threading.Event()
        self._is_closing = False
        self._beat()
        self._store.wait([_beat_key(other) for other in range(num_ranks)])
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def verdict(self) -> Verdict | None:
        """What ended the group, on any host."""
        if self._verdict is None and self._board is not None:
            return self._board.verdict()
        return self._verdict

    def post(self, verdict: Verdict) -> None:
        """Give the verdict unless there is one; the others see it with their next beat."""
        with self._lock:
            self._verdict = self._verdict or verdict
        self._wake.set()

    def lost(self, ranks: Sequence[int]) -> Verdict | None:
        """Which of `ranks` left, or stands still for longest, if any does by now."""
        now_s = time.monotonic()
        others = [rank for rank in ranks if rank != self._rank]
        for rank in others:
            if self._beats[rank].has_left:
                return Verdict(VerdictKind.LEFT, rank)
        if now_s - self._answered_s > STALE_S:
            return Verdict(VerdictKind.DEAD, self._keeper)
        still = [rank for rank in others if now_s - self._changed_s[rank] > STALE_S]
        if not still:
            return None
        return Verdict(VerdictKind.DEAD, min(still, key=lambda rank: self._changed_s[rank]))

    def last(self, ranks: Sequence[int], axis: str) -> int | None:
        """Which of `ranks` has begun fewer collectives of an axis than this one."""
        own = self.num_calls.get(axis, 0)
        counts = {rank: self._beats[rank].num_calls.get(axis, 0) for rank in ranks}
        behind = [rank for rank in ranks if rank != self._rank and counts[rank] < own]
        return min(behind, key=lambda rank: counts[rank], default=None)

    def close(self) -> None:
        """Say that this rank leaves, and stop."""
        self._is_closing = True
        self._wake.set()
        self._thread.join(STALE_S)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._is_closing
            try:
                beats = self._read_beats()
                self._exchange_verdicts()  # who leaves because of trouble has told of it before
                self._take_in(beats)
                self._beat(has_left=is_last)
            except RuntimeError as error:  # torch's errors of the store
                if not self._is_closing:
                    logger.info("the ranks' store is lost: %s", str(error).partition("\n")[0])
                    self._answered_s = -math.inf
                return
            if not is_last:
                self._wake.wait(_BEAT_S)
                self._wake.clear()

    def _beat(self, *, has_left: bool = False) -> None:
        self._count += 1
        beat = _Beat(self._count, dict(self.num_calls), has_left)
        self._store.set(_beat_key(self._rank), msgspec.json.encode(beat).decode())

    def _read_beats(self) -> list[_Beat]:
        values = self._store.multi_get([_beat_key(rank) for rank in range(len(self._beats))])
        return [msgspec.json.decode(value, type=_Beat) for value in values]

    def _take_in(self, beats: Sequence[_Beat]) -> None:
        now_s = time.monotonic()
        for rank, beat in enumerate(beats):
            if beat.count != self._beats[rank].count:
                self._beats[rank] = beat
                self._changed_s[rank] = now_s
        self._answered_s = now_s

    def _exchange_verdicts(self) -> None:
        verdict = self.verdict()
        if verdict is not None and not self._is_posted:
            self._store.compare_set("verdict", "", msgspec.json.encode(verdict).decode())
            self._is_posted = True
        if self._is_posted or self._store.check(["verdict"]):
            found = msgspec.json.decode(self._store.get("verdict"), type=Verdict)
            self._is_posted = True
            with self._lock:
                self._verdict = self._verdict or found
            if self._board is not None:
                self._board.post(found)


def _beat_key(rank: int) -> str:
    return f"beat/{rank}"
