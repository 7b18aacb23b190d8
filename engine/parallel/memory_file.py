"""Anonymous memory that the ranks of one host map: nothing named is left behind when they go.

The file's first bytes are random: who maps another process's file sees whether it is the right one.
"""

import ctypes
import mmap
import os
import stat
from typing import Self

import msgspec

HEAD_BYTES = 64
_NONCE_BYTES = 16


class FileAddress(msgspec.Struct, frozen=True):
    """What another process of the host needs to map the file."""

    pid: int
    fd: int
    num_bytes: int
    nonce: bytes


class MemoryFile:
    """One mapping; `address` is where the bytes after the head begin."""

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Map `num_bytes` after the head; takes `fd` over, even when it fails (OSError)."""
        self._fd = fd
        self.num_bytes = num_bytes
        try:
            self._map = mmap.mmap(fd, HEAD_BYTES + num_bytes, mmap.MAP_SHARED)
        except OSError:
            os.close(fd)
            raise
        self._anchor: ctypes.Array[ctypes.c_char] | None = (
            ctypes.c_char * len(self._map)
        ).from_buffer(self._map)
        self.address = ctypes.addressof(self._anchor) + HEAD_BYTES

    @classmethod
    def create(cls, num_bytes: int) -> Self:
        """Make a file of zeros; pages are taken when they are first touched."""
        fd = os.memfd_create("isthmus-ranks", os.MFD_CLOEXEC)
        os.ftruncate(fd, HEAD_BYTES + num_bytes)
        os.pwrite(fd, os.urandom(_NONCE_BYTES), 0)
        return cls(fd, num_bytes)

    @classmethod
    def open(cls, address: FileAddress, num_bytes: int) -> Self:
        """Map the file of another process.

        Raises:
            OSError: it is not there, has another size, or is another host's; the text says which.
        """
        path = f"/proc/{address.pid:d}/fd/{address.fd:d}"
        # A look before opening: opening a device or a pipe may have effects of its own.
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116
            raise OSError(f"{path} is not a memory file")
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        size = os.fstat(fd).st_size
        if not size == address.num_bytes + HEAD_BYTES == num_bytes + HEAD_BYTES:
            os.close(fd)
            raise OSError(f"{path} has {size - HEAD_BYTES} bytes, not {num_bytes}")
        if len(address.nonce) != _NONCE_BYTES or os.pread(fd, _NONCE_BYTES, 0) != address.nonce:
            os.close(fd)
            raise OSError(f"{path} is another file: the process is in another container")
        return cls(fd, num_bytes)

    def offer(self) -> FileAddress:
        """What `open` needs; good until `close_file`."""
        nonce = self._map[:_NONCE_BYTES]
        return FileAddress(os.getpid(), self._fd, self.num_bytes, nonce)

    def close_file(self) -> None:
        """Keep the mapping only: nobody else will map it."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def close(self) -> None:
        """Unmap; `address` must not be used any more."""
        self.close_file()
        if self._anchor is not None:
            self._anchor = None
            self._map.close()
