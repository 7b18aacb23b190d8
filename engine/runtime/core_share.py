"""How the workers of one host share its cores without oversubscribing them.

Rule: every worker has home cores. While a worker is busy (it has something to compute) its home
cores are its own; while it is idle any other worker may borrow them. That is decided at the start
of each step, so a borrower gives back at its next step, and a step that borrows computes fewer
prompt tokens (`EngineConfig.shared_step_tokens_per_thread`) so that this comes soon.

The flags stand in a memfd that the launcher makes and its workers inherit: one slot a worker.
A worker that died busy is found by its pid, looked up at most once a second.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

_SLOT = struct.Struct("<IIQ")  # pid, is busy, bit mask of home cores
MAX_WORKERS = 64
SHARE_BYTES = MAX_WORKERS * _SLOT.size
_NUM_KNOWN_CORES = 64  # bits of a mask
_LIVENESS_INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class CoreGrant:
    """What one step may use."""

    num_threads: int
    cores: frozenset[int]
    is_borrowing: bool


def create_core_share() -> int:
    """Make the shared flags; returns the descriptor that workers inherit (launcher)."""
    fd = os.memfd_create("isthmus-cores", 0)
    os.ftruncate(fd, SHARE_BYTES)
    return fd


def split_cores(cores: Sequence[int], num_workers: int) -> list[tuple[int, ...]]:
    """Home cores of each worker: an even split, at least one each; too many workers share."""
    ordered = sorted(cores)
    if num_workers > len(ordered):
        return [(ordered[index % len(ordered)],) for index in range(num_workers)]
    size, extra = divmod(len(ordered), num_workers)
    starts = [index * size + min(index, extra) for index in range(num_workers + 1)]
    return [tuple(ordered[starts[i] : starts[i + 1]]) for i in range(num_workers)]


class CoreShare:
    """One worker's view of the shared flags; used by its engine thread only."""

    def __init__(
        self,
        home_cores: Sequence[int],
        *,
        fd: int | None = None,
        slot: int = 0,
        max_threads: int | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Without `fd` there is nobody to share with: every step may use all home cores."""
        if not home_cores:
            raise ValueError("home_cores must not be empty")
        if fd is not None and not all(0 <= core < _NUM_KNOWN_CORES for core in home_cores):
            raise ValueError(f"shared home_cores must be in [0, 64), got {home_cores}")
        if not 0 <= slot < MAX_WORKERS:
            raise ValueError(f"slot must be in [0, {MAX_WORKERS}), got {slot}")
        self.home_cores = frozenset(home_cores)
        self._max_threads = max_threads
        self._slot = slot
        self._monotonic = monotonic
        self._checked_s = monotonic()
        self._map = None if fd is None else mmap.mmap(fd, SHARE_BYTES, mmap.MAP_SHARED)
        self._is_busy = False
        self._num_process_cores = len(os.sched_getaffinity(0))
        self._grant = self._grant_of(self.home_cores)
        self._write(is_busy=False)

    @classmethod
    def alone(cls, num_threads: int | None = None) -> Self:
        """All cores that this process may run on."""
        return cls(sorted(os.sched_getaffinity(0)), max_threads=num_threads)

    @property
    def most_threads(self) -> int:
        """The most threads that any step will be granted."""
        cores = self._num_process_cores if self._map is not None else len(self.home_cores)
        return cores if self._max_threads is None else min(cores, self._max_threads)

    def settle(self) -> None:
        """Keep the calling thread on the home cores, once its helper threads are started.

        Helpers stay free to run on borrowed cores; two workers' main threads never meet on one.
        """
        if self._map is not None:
            os.sched_setaffinity(0, self.home_cores)

    def begin_step(self) -> CoreGrant:
        """Mark this worker busy and say what its next step may use."""
        if self._map is None:
            return self._grant
        if not self._is_busy:
            self._write(is_busy=True)
        idle_mask, busy_mask = self._others()
        cores = self.home_cores | _cores_of(idle_mask & ~busy_mask)
        if cores != self._grant.cores:
            self._grant = self._grant_of(cores)
        return self._grant

    def rest(self) -> None:
        """Mark this worker idle: others may borrow its home cores."""
        if self._is_busy:
            self._write(is_busy=False)

    def close(self) -> None:
        """Give up the slot."""
        if self._map is not None:
            self._map[self._offset : self._offset + _SLOT.size] = bytes(_SLOT.size)
            self._map.close()
            self._map = None

    @property
    def _offset(self) -> int:
        return self._slot * _SLOT.size

    def _grant_of(self, cores: frozenset[int]) -> CoreGrant:
        num_threads = len(cores)
        if self._max_threads is not None:
            num_threads = min(num_threads, self._max_threads)
        return CoreGrant(num_threads, cores, is_borrowing=cores > self.home_cores)

    def _write(self, *, is_busy: bool) -> None:
        self._is_busy = is_busy
        if self._map is not None:
            mask = sum(1 << core for core in self.home_cores)
            _SLOT.pack_into(self._map, self._offset, os.getpid(), int(is_busy), mask)

    def _others(self) -> tuple[int, int]:
        """Home cores of the idle and of the busy other workers, as bit masks."""
        assert self._map is not None, "nobody to share with"
        now_s = self._monotonic()
        is_checking = now_s - self._checked_s >= _LIVENESS_INTERVAL_S
        if is_checking:
            self._checked_s = now_s
        idle_mask = busy_mask = 0
        for slot, (pid, is_busy, mask) in enumerate(_SLOT.iter_unpack(self._map[:SHARE_BYTES])):
            if pid == 0 or slot == self._slot:
                continue
            if is_busy and is_checking and not _is_alive(pid):
                _SLOT.pack_into(self._map, slot * _SLOT.size, pid, 0, mask)
                idle_mask |= mask
            elif is_busy:
                busy_mask |= mask
            else:
                idle_mask |= mask
        return idle_mask, busy_mask


def _cores_of(mask: int) -> frozenset[int]:
    return frozenset(core for core in range(_NUM_KNOWN_CORES) if mask >> core & 1)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
