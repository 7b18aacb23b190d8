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

STREAMING_BYTES = 256 << 10
"""From here on a copy goes past the caches: whoever reads it does so later, elsewhere."""

LIBRARY_PATH = Path(engine.__path__[0]) / "kernels" / "libisthmus.so"


def _load() -> "ctypes._NamedFuncPointer | None":
    try:
        function = ctypes.CDLL(str(LIBRARY_PATH)).isthmus_copy_inside
    except (OSError, AttributeError) as error:  # not built, or older than its sources
        logger.info("KV is copied by numpy: %s", error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, size, pointer, size, *[pointer] * 3, size, ctypes.c_int]
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
    if _native is None:
        _copy_slowly(target, source, target_offsets, source_offsets, lengths)
        return
    failed = _native(
        target.ctypes.data,
        len(target),
        source.ctypes.data,
        len(source),
        np.ascontiguousarray(target_offsets).ctypes.data,
        np.ascontiguousarray(source_offsets).ctypes.data,
        np.ascontiguousarray(lengths).ctypes.data,
        len(lengths),
        is_streaming,
    )
    if failed:
        raise IndexError(_OUTSIDE)


_OUTSIDE = "a run lies outside of its buffer"


def _copy_slowly(
    target: Bytes,
    source: Bytes,
    target_offsets: Offsets,
    source_offsets: Offsets,
    lengths: Offsets,
) -> None:
    ends = ((target_offsets, target), (source_offsets, source))
    if (lengths < 0).any() or any(
        (offsets < 0).any() or (offsets + lengths > len(data)).any() for offsets, data in ends
    ):
        raise IndexError(_OUTSIDE)
    runs = zip(target_offsets.tolist(), source_offsets.tolist(), lengths.tolist(), strict=True)
    for there, here, length in runs:
        np.copyto(target[there : there + length], source[here : here + length])
