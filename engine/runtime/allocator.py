"""How the C library keeps memory between steps."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_KEPT_BYTES = 32 << 20  # glibc's own upper bound for the second
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> None:
    """Keep freed buffers in the process: every step allocates the same ones again.

    By default glibc hands activations of a megabyte back to the kernel and takes page faults for
    them in the next step. Measured: prefill 5 %, a decode step at batch 32 up to 5 %, sampling
    30 %. Does nothing where the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
