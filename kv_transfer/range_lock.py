"""One-byte locks on a shared file: a writer's turn and the owner's fence exclude each other.

Open-file-description locks: they hold between any two opens of the file, in one process or in
several, and the kernel drops them when their holder dies. The bytes need not exist: each lease
has the byte at its own number, far beyond the end of the pool.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator

# struct flock of 64-bit Linux: type, whence, start, length, pid (0 for this kind of lock).
_FLOCK = struct.Struct("hhqqi4x")


def try_lock(fd: int, byte: int) -> bool:
    """Take the lock for this open file; False when another one has it. Taking it twice is fine."""
    try:
        _set(fd, fcntl.F_WRLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock(fd: int, byte: int) -> None:
    _set(fd, fcntl.F_UNLCK, byte)


@contextlib.contextmanager
def locked(fd: int, byte: int) -> Iterator[bool]:
    """Hold the lock inside the block; yields False where another one has it."""
    if not try_lock(fd, byte):
        yield False
        return
    try:
        yield True
    finally:
        unlock(fd, byte)


def _set(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
