"""Taking the pages of a mapping before they are needed."""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module has no name for it
_PIECE_BYTES = 8 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def populate(memory: mmap.mmap, *, is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Back a mapping with pages and map them, so that first writes take no faults.

    Other threads run meanwhile (`mmap.madvise` would hold the interpreter lock throughout). The
    pages are huge where the host lends such to shared memory (`shmem_enabled` is `advise`).

    Args:
        memory: writable.
        is_wanted: asked before every 8 MiB; False ends it.

    Raises:
        OSError: as madvise fails; ENOMEM when the host's memory does not suffice.
    """
    with contextlib.suppress(AttributeError, OSError):  # Linux only; a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    first = ctypes.c_char.from_buffer(memory)
    try:
        start = ctypes.addressof(first)
        for offset in range(0, len(memory), _PIECE_BYTES):
            if not is_wanted():
                return
            num_bytes = min(_PIECE_BYTES, len(memory) - offset)
            at = ctypes.c_void_p(start + offset)
            if _libc.madvise(at, ctypes.c_size_t(num_bytes), _MADV_POPULATE_WRITE) == 0:
                continue
            if (error := ctypes.get_errno()) == errno.EINVAL:
                return  # an older kernel: pages come one by one, on first use
            raise OSError(error, os.strerror(error))
    finally:
        del first  # a mapping cannot be closed under a view
