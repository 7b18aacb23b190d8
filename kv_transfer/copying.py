"""Copies of many runs of bytes: one call of the C library, or numpy's where it is not built."""

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import engine

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]
Offsets = npt.NDArray[np.int64]

LIBRARY_PATH = Path(engine.__path__[0]) / "kernels" / "libisthmus.so"
_OUTSIDE = "a run lies outside of its buffer"


class _BlockCopy(ctypes.Structure):
    """`struct block_copy` of copy.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("target", "source")),
        *((name, ctypes.c_int64) for name in ("target_size", "source_size")),
        *((name, ctypes.c_int64) for name in ("target_block_bytes", "source_block_bytes")),
        *((name, ctypes.c_void_p) for name in ("target_offsets", "source_offsets", "lengths")),
        ("num_runs", ctypes.c_int64),
    )


@dataclass(frozen=True, slots=True)
class _Native:
    copy_blocks: Callable[[int, int, int, int], int]
    copy_inside: Callable[..., int]
    num_alike: Callable[[int, int], int]


def _load() -> _Native | None:
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
        copy_blocks, copy_inside = library.isthmus_copy_blocks, library.isthmus_copy_inside
        num_alike = library.isthmus_num_alike
    except (OSError, AttributeError) as error:  # not built, or older than its sources
        logger.info("KV is copied by numpy: %s", error)
        return None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    copy_blocks.argtypes = [pointer, pointer, size, size]
    copy_inside.argtypes = [pointer, size, pointer, size, *[pointer] * 3, size]
    num_alike.argtypes, num_alike.restype = [pointer, size], size
    return _Native(copy_blocks, copy_inside, num_alike)


_native = _load()


@dataclass(frozen=True, slots=True)
class RunTable:
    """What is copied of every block: runs of bytes, and where they lie in a block of either end."""

    target_offsets: Offsets
    source_offsets: Offsets
    lengths: Offsets
    target_block_bytes: int
    source_block_bytes: int


class BlockCopies:
    """Copies the same runs of other blocks each time; one push at a time. The pools are flat."""

    def __init__(self, target: Bytes, source: Bytes, table: RunTable) -> None:
        """Raises IndexError for a run that is not inside its block."""
        _check(table.target_offsets, table.lengths, table.target_block_bytes)
        _check(table.source_offsets, table.lengths, table.source_block_bytes)
        self.target = target
        self._source = source
        self._table = table
        self._num_block_runs = len(table.lengths)
        self._longest_bytes = int(table.lengths.max())
        self._columns = tuple(
            np.ascontiguousarray(column)
            for column in (table.target_offsets, table.source_offsets, table.lengths)
        )
        self._block_bytes = int(table.lengths.sum())
        self.aim(np.empty((0, 5), np.int64))
        self._struct: _BlockCopy | None = None
        if _native is not None:
            self._struct = _BlockCopy(
                *(target.ctypes.data, source.ctypes.data, len(target), len(source)),
                *(table.target_block_bytes, table.source_block_bytes),
                *(column.ctypes.data for column in self._columns),
                self._num_block_runs,
            )
            self._address = ctypes.addressof(self._struct)

    def aim(self, rows: Offsets) -> None:
        """Copy of and to these blocks from now on.

        Args:
            rows: [N, 5], C-contiguous: the source's block in column 0, the target's in column 2.
        """
        self._rows = rows
        self._rows_address = _address(rows)
        self._num_runs = len(rows) * self._num_block_runs
        self.num_bytes = len(rows) * self._block_bytes

    def slices(self, max_bytes: int) -> list[tuple[int, int]]:
        """[first, end) of all runs, block by block: at most `max_bytes`, or one run, at a time."""
        if self.num_bytes <= max_bytes:
            return [(0, self._num_runs)]
        step = max(1, max_bytes // self._longest_bytes)
        firsts = range(0, self._num_runs, step)
        return [(first, min(first + step, self._num_runs)) for first in firsts]

    def copy(self, first: int, end: int) -> None:
        """Runs [first, end), past the caches: whoever reads them does so later, elsewhere.

        Releases the interpreter lock.

        Raises:
            IndexError: a block is not in its pool; nothing was copied.
        """
        if not 0 <= first < end <= self._num_runs:
            raise IndexError(f"runs [{first}, {end}) of {self._num_runs}")
        if _native is None:
            _copy_slowly(self.target, self._source, *self.runs(first, end))
        elif _native.copy_blocks(self._address, self._rows_address, first, end - first):
            raise IndexError(_OUTSIDE)

    def runs(self, first: int, end: int) -> tuple[Offsets, Offsets, Offsets]:
        """The places of runs [first, end) in both pools, and their lengths."""
        block, run = np.divmod(np.arange(first, end), self._num_block_runs)
        target_offsets, source_offsets, lengths = self._columns
        return (
            self._rows[block, 2] * self._table.target_block_bytes + target_offsets[run],
            self._rows[block, 0] * self._table.source_block_bytes + source_offsets[run],
            lengths[run],
        )

    def are_done(self, first: int, end: int) -> bool:
        """Whether the target's bytes of runs [first, end) are the source's."""
        runs = zip(*(column.tolist() for column in self.runs(first, end)), strict=True)
        return all(
            np.array_equal(self.target[there : there + length], self._source[here : here + length])
            for there, here, length in runs
        )


def num_alike(rows: Offsets) -> int:
    """How many of the first of `rows` have columns 1, 3 and 4 as the first row has.

    Args:
        rows: [N, 5], N > 0, C-contiguous.
    """
    if len(rows) == 1:
        return 1
    if _native is not None:
        return _native.num_alike(_address(rows), len(rows))
    slots = rows[:, [1, 3, 4]]
    others = np.flatnonzero((slots != slots[0]).any(axis=1))
    return int(others[0]) if len(others) else len(rows)


def _address(rows: Offsets) -> int:
    """Of contiguous, writable rows; `rows.ctypes` takes three times as long."""
    return ctypes.addressof(ctypes.c_char.from_buffer(rows.data)) if len(rows) else 0


def copy_runs(
    target: Bytes,
    source: Bytes,
    target_offsets: Offsets,
    source_offsets: Offsets,
    lengths: Offsets,
) -> None:
    """Copy `lengths[i]` bytes from `source_offsets[i]` to `target_offsets[i]`, for every i.

    All arrays are flat and contiguous. Releases the interpreter lock.

    Raises:
        IndexError: a run is not inside both; nothing was copied.
    """
    if _native is None:
        _copy_slowly(target, source, target_offsets, source_offsets, lengths)
        return
    failed = _native.copy_inside(
        target.ctypes.data,
        len(target),
        source.ctypes.data,
        len(source),
        np.ascontiguousarray(target_offsets).ctypes.data,
        np.ascontiguousarray(source_offsets).ctypes.data,
        np.ascontiguousarray(lengths).ctypes.data,
        len(lengths),
    )
    if failed:
        raise IndexError(_OUTSIDE)


def _copy_slowly(
    target: Bytes,
    source: Bytes,
    target_offsets: Offsets,
    source_offsets: Offsets,
    lengths: Offsets,
) -> None:
    _check(target_offsets, lengths, len(target))
    _check(source_offsets, lengths, len(source))
    runs = zip(target_offsets.tolist(), source_offsets.tolist(), lengths.tolist(), strict=True)
    for there, here, length in runs:
        np.copyto(target[there : there + length], source[here : here + length])


def _check(offsets: Offsets, lengths: Offsets, num_bytes: int) -> None:
    if (lengths < 0).any() or (offsets < 0).any() or (offsets + lengths > num_bytes).any():
        raise IndexError(_OUTSIDE)
