"""Copies of many runs of bytes: one call of the C library, or numpy's where it is not built."""

import ctypes
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

import engine

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

STREAMING_BYTES = 1 << 20
"""From here on a copy goes past the caches: whoever reads it does so later, elsewhere."""

LIBRARY_PATH = Path(engine.__path__[0]) / "kernels" / "libisthmus.so"


def _load() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(str(LIBRARY_PATH)).isthmus_copy_runs
    except (OSError, AttributeError) as error:  # not built, or older than its sources
        logger.info("KV is copied by numpy: %s", error)
        return None
    pointers = [ctypes.c_void_p] * 5
    function.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int]
    function.restype = None
    return function


_native = _load()


def copy_runs(
    target: Bytes,
    source: Bytes,
    target_offsets: Offsets,
    source_offsets: Offsets,
    lengths: Offsets,
    *,
    is_streaming: bool,
) -> None:
    """Copy `lengths[i]` bytes from `source_offsets[i]` to `target_offsets[i]`, for every i.

    All arrays are flat and contiguous. Releases the interpreter lock.

    Raises:
        IndexError: a run is not inside both; nothing was copied.
    """
    if not len(lengths):
        return
    ends = ((target_offsets, target), (source_offsets, source))
    if lengths.min() < 0 or any(
        offsets.min() < 0 or (offsets + lengths).max() > len(data) for offsets, data in ends
    ):
        raise IndexError("a run lies outside of its buffer")
    if _native is None:
        runs = zip(target_offsets.tolist(), source_offsets.tolist(), lengths.tolist(), strict=True)
        for there, here, length in runs:
            np.copyto(target[there : there + length], source[here : here + length])
        return
    _native(
        target.ctypes.data,
        source.ctypes.data,
        np.ascontiguousarray(target_offsets).ctypes.data,
        np.ascontiguousarray(source_offsets).ctypes.data,
        np.ascontiguousarray(lengths).ctypes.data,
        len(lengths),
        is_streaming,
    )
