"""Locks on a shared file: the turns of a lease's writers and the owner's fence exclude each other.

Open-file-description locks: they hold between any two opens of the file, in one process or in
several, and the kernel drops them when their holder dies. The bytes need not exist: each lease
has two at twice its own number, far beyond the end of the pool. The first is a gate, through
which a writer passes to the second, which it holds during its turn. Several may hold it at once:
the ranks of a sending worker write into one pool under one lease. The fence shuts the gate first,
so that it need not find a moment in which none of them writes.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

# struct flock of 64-bit Linux: type, whence, start, length, pid (0 for this kind of lock).
_FLOCK = struct.Struct("hhqqi4x")


def fence(fd: int, lease_id: int) -> bool:
    """Let no turn begin any more; True when none is under way either. Repeat until it is True."""
    return _try(fd, fcntl.F_WRLCK, 2 * lease_id, 1) and _try(fd, fcntl.F_WRLCK, 2 * lease_id + 1, 1)


def unfence(fd: int, lease_id: int) -> None:
    _set(fd, fcntl.F_UNLCK, 2 * lease_id, 2)


@contextlib.contextmanager
def writing(fd: int, lease_id: int) -> Iterator[bool]:
    """A writer's turn inside the block; yields False where the lease is fenced."""
    if not _try(fd, fcntl.F_RDLCK, 2 * lease_id, 2):
        yield False
        return
    try:
        _set(fd, fcntl.F_UNLCK, 2 * lease_id, 1)
        yield True
    finally:
        _set(fd, fcntl.F_UNLCK, 2 * lease_id, 2)


def _try(fd: int, kind: int, byte: int, num_bytes: int) -> bool:
    """False when another open of the file stands in the way."""
    try:
        _set(fd, kind, byte, num_bytes)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _set(fd: int, kind: int, byte: int, num_bytes: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, num_bytes, 0))
