"""Locks on a shared file: the turns of a lease's writers and the owner's fence exclude each other.

Open-file-description locks: they hold between any two opens of the file, in one process or in
several, and the kernel drops them when their holder dies. The bytes need not exist: each lease
has two at twice its own number, far beyond the end of the pool. The first is a gate, through
which a writer passes to the second, which it holds during its turn. Several may hold it at once:
the ranks of a sending worker write into one pool under one lease. The fence shuts the gate first,
so that it need not find a moment in which none of them writes.
"""

import errno
import fcntl
import os
import struct
from functools import lru_cache

# struct flock of 64-bit Linux: type, whence, start, length, pid (0 for this kind of lock).
_FLOCK = struct.Struct("hhqqi4x")
_TAKEN = (errno.EAGAIN, errno.EACCES)


def fence(fd: int, lease_id: int) -> bool:
    """Let no turn begin any more; True when none is under way either. Repeat until it is True."""
    return _try(fd, fcntl.F_WRLCK, 2 * lease_id, 1) and _try(fd, fcntl.F_WRLCK, 2 * lease_id + 1, 1)


def unfence(fd: int, lease_id: int) -> None:
    _set(fd, fcntl.F_UNLCK, 2 * lease_id, 2)


def writing(fd: int, lease_id: int) -> "_Turn":
    """A writer's turn inside the `with` block, which gets False where the lease is fenced."""
    return _Turn(fd, lease_id)


class _Turn:
    """Cheaper than a generator: one for each small push."""

    __slots__ = ("_fd", "_is_open", "_locks")

    def __init__(self, fd: int, lease_id: int) -> None:
        self._fd = fd
        self._locks = _locks(lease_id)
        self._is_open = False

    def __enter__(self) -> bool:
        both, passed, _ = self._locks
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, both)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            raise
        self._is_open = True
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, passed)
        return True

    def __exit__(self, *exc_info: object) -> None:
        if self._is_open:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, self._locks[2])


@lru_cache(maxsize=256)
def _locks(lease_id: int) -> tuple[bytes, bytes, bytes]:
    """What a turn sets: both bytes to pass the gate, the gate free again, both free."""
    return (
        _lock(fcntl.F_RDLCK, 2 * lease_id, 2),
        _lock(fcntl.F_UNLCK, 2 * lease_id, 1),
        _lock(fcntl.F_UNLCK, 2 * lease_id, 2),
    )


def _try(fd: int, kind: int, byte: int, num_bytes: int) -> bool:
    """False when another open of the file stands in the way."""
    try:
        _set(fd, kind, byte, num_bytes)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        raise
    return True


def _set(fd: int, kind: int, byte: int, num_bytes: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(kind, byte, num_bytes))


def _lock(kind: int, byte: int, num_bytes: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, num_bytes, 0)
