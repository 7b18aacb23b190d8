"""A frame's payload: parts of a pool that lie here and there, as buffers for a socket."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash

from kv_transfer.copying import Bytes, Offsets, copy_runs
from kv_transfer.runs import merged

PIECE_BYTES = 512 << 10
"""Goes through the socket and its checksum while it is in the cache, beside what the other end
does with the same piece or the one before."""
SCATTER_BYTES = 8192
SCATTER_RUNS = 16
"""More runs that are shorter are gathered: cheaper than a system call's list of them."""


class Payload:
    """The runs of one frame in `pool`, and a buffer for those that are short."""

    def __init__(self, pool: Bytes, offsets: Offsets, lengths: Offsets, scratch: Bytes) -> None:
        self._pool = pool
        num_bytes = int(lengths.sum())
        self._scratch = scratch[:num_bytes]
        self._offsets, self._lengths = merged(offsets, lengths)
        num_runs = len(self._lengths)
        self.is_gathered = num_runs > SCATTER_RUNS and num_bytes < SCATTER_BYTES * num_runs

    def views(self) -> list[memoryview]:
        """Where the payload is, or is to be received: the runs, or the buffer."""
        if self.is_gathered:
            return [self._scratch.data]
        pool = self._pool.data
        runs = zip(self._offsets.tolist(), self._lengths.tolist(), strict=True)
        return [pool[offset : offset + length] for offset, length in runs]

    def gather(self) -> None:
        """Fill the buffer from the runs, if it is used."""
        if self.is_gathered:
            places = _places(self._lengths)
            copies = (places, self._offsets, self._lengths)
            copy_runs(self._scratch, self._pool, *copies)

    def scatter(self) -> None:
        """Fill the runs from the buffer, if it is used."""
        if self.is_gathered:
            places = _places(self._lengths)
            copies = (self._offsets, places, self._lengths)
            copy_runs(self._pool, self._scratch, *copies)


def digest(views: Iterable[memoryview]) -> int:
    """The xxh3_64 of all of them in order."""
    hashed = xxhash.xxh3_64()
    for view in views:
        hashed.update(view)
    return hashed.intdigest()


def cut(views: Sequence[memoryview], max_bytes: int) -> Iterator[list[memoryview]]:
    """The same in order, so many bytes at a time."""
    piece: list[memoryview] = []
    num_left = max_bytes
    for view in views:
        for first in range(0, len(view), max_bytes):
            part = view[first : first + max_bytes]
            if len(part) > num_left:
                yield piece
                piece, num_left = [], max_bytes
            piece.append(part)
            num_left -= len(part)
    if piece:
        yield piece


def _places(lengths: Offsets) -> Offsets:
    return np.cumsum(lengths) - lengths
