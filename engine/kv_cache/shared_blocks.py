"""Memory for KV blocks that other processes of this host can map; no torch."""

import errno
import mmap
import os

from engine.kv_cache.populate import populate

NONCE_BYTES = 16


def shared_blocks(num_bytes: int) -> tuple[int, mmap.mmap]:
    """A memfd of `num_bytes` zeros with NONCE_BYTES random bytes behind, and its mapping.

    A process on the same host can map /proc/<pid>/fd/<n>, and nothing is left behind when this
    process is gone. The caller closes the descriptor.

    Raises:
        MemoryError: the host's memory does not suffice.
    """
    fd = os.memfd_create("isthmus-kv", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, num_bytes + NONCE_BYTES)
        memory = mmap.mmap(fd, num_bytes + NONCE_BYTES, mmap.MAP_SHARED)
        _prefault(memory)
        memory[num_bytes:] = os.urandom(NONCE_BYTES)
    except BaseException:
        os.close(fd)
        raise
    return fd, memory


def _prefault(memory: mmap.mmap) -> None:
    """Take the pages now: a first write costs a quarter of a microsecond a KiB, in every prompt.

    It also turns a host that is too small into an error at start-up.
    """
    try:
        populate(memory)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(
            f"KV blocks of {len(memory)} bytes do not fit this host's memory; lower"
            " kv_pool_bytes, kv_memory_fraction or, of a store, memory_bytes"
        ) from error
