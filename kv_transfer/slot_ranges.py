"""Tokens of a sequence as slots of blocks, here and there."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt

from kv_transfer.copying import num_alike

_Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class SlotRange:
    """Neighbouring tokens in one block here and one block there."""

    local_block_id: int
    local_slot: int
    remote_block_id: int
    remote_slot: int
    num_slots: int


class SlotRanges(Sequence[SlotRange]):
    """SlotRanges, kept as one array: a push may have thousands of small blocks."""

    def __init__(self, rows: _Rows) -> None:
        """`rows`: [N, 5], the fields of `SlotRange` in order; it belongs to this from now on."""
        self.rows = rows

    @classmethod
    def of(cls, parts: Iterable[SlotRange]) -> "SlotRanges":
        """The same, or made of them."""
        if isinstance(parts, SlotRanges):
            return parts
        rows = [
            (p.local_block_id, p.local_slot, p.remote_block_id, p.remote_slot, p.num_slots)
            for p in parts
        ]
        return cls(np.array(rows, np.int64).reshape(-1, 5))

    @classmethod
    def joined(cls, some: Sequence["SlotRanges"]) -> "SlotRanges":
        return some[0] if len(some) == 1 else cls(np.concatenate([each.rows for each in some]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_slots(self) -> int:
        return int(self.rows[:, 4].sum())

    @overload
    def __getitem__(self, index: int) -> SlotRange: ...
    @overload
    def __getitem__(self, index: slice) -> "SlotRanges": ...
    def __getitem__(self, index: int | slice) -> "SlotRange | SlotRanges":
        if isinstance(index, slice):
            return SlotRanges(self.rows[index])
        return SlotRange(*self.rows[index].tolist())

    def __iter__(self) -> Iterator[SlotRange]:
        return (SlotRange(*row) for row in self.rows.tolist())

    def by_slots(self) -> list["SlotRanges"]:
        """Those with the same slots at both ends together; mostly whole blocks and two ends."""
        rows = self.rows
        if num_alike(rows) == len(rows):
            return [self]
        some = []
        for _ in range(3):
            num = num_alike(rows)
            some.append(SlotRanges(rows[:num]))
            rows = rows[num:]
            if not len(rows):
                return some
        kinds, kind_of = np.unique(rows[:, [1, 3, 4]], axis=0, return_inverse=True)
        kind_of = kind_of.reshape(-1)
        return some + [SlotRanges(rows[kind_of == kind]) for kind in range(len(kinds))]


def slot_ranges(
    local_block_ids: Sequence[int],
    remote_block_ids: Sequence[int],
    *,
    local_size_tokens: int,
    remote_size_tokens: int,
    first_token: int,
    end_token: int,
) -> SlotRanges:
    """Cut tokens [first_token, end_token) of a sequence at the block borders of both ends."""
    if first_token >= end_token:
        return SlotRanges(np.empty((0, 5), np.int64))
    small, large = sorted((local_size_tokens, remote_size_tokens))
    firsts = np.arange(first_token // small * small, end_token, small)
    firsts[0] = first_token
    if large % small:
        others = np.arange((first_token // large + 1) * large, end_token, large)
        firsts = np.unique(np.concatenate([firsts, others]))
    rows = np.empty((len(firsts), 5), np.int64)
    ends = ((local_block_ids, local_size_tokens), (remote_block_ids, remote_size_tokens))
    for column, (block_ids, size) in zip((0, 2), ends, strict=True):
        lowest, highest = first_token // size, (end_token - 1) // size + 1
        ids = np.asarray(block_ids[lowest:highest], np.int64)
        rows[:, column] = ids[firsts // size - lowest]
        rows[:, column + 1] = firsts % size
    rows[:-1, 4] = firsts[1:] - firsts[:-1]
    rows[-1, 4] = end_token - firsts[-1]
    return SlotRanges(rows)
