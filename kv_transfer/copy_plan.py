"""What pushes from one pool into another copy of each block, worked out once."""

from collections.abc import Iterator, Sequence

from kv_transfer.blocks import BlockSource, HostBlocks
from kv_transfer.copying import BlockCopies, RunTable
from kv_transfer.reshard import Transfer
from kv_transfer.runs import Region
from kv_transfer.slot_ranges import SlotRange, SlotRanges

_MAX_KINDS = 1024


class CopyPlan:
    """For one push at a time: working it out takes several times as long as a small push."""

    def __init__(self, source: HostBlocks, target: HostBlocks, *, max_bytes: int) -> None:
        """`max_bytes`: of a run, where that goes."""
        self.source = source
        self._target = target
        self._max_bytes = max_bytes
        self._kinds: dict[tuple[Transfer, tuple[int, int, int]], BlockCopies] = {}

    def copies(
        self, source: BlockSource, parts: Sequence[SlotRange], transfers: Sequence[Transfer]
    ) -> Iterator[BlockCopies]:
        """All `transfers` of all `parts`; each is aimed at its blocks until the next is taken.

        Args:
            source: with the blocks that this plan is for.
            parts: what is written.
            transfers: from which box to which.
        """
        assert source.blocks is self.source
        if not len(parts):
            return
        for same in SlotRanges.of(parts).by_slots():
            rows = same.rows
            slots = (rows.item(1), rows.item(3), rows.item(4))
            if (index_of := source.index_of) is not None:
                rows = rows.copy()
                rows[:, 0] = [index_of[block_id] for block_id in same.rows[:, 0].tolist()]
            for transfer in transfers:
                copies = self._of_kind(transfer, slots)
                copies.aim(rows)
                yield copies

    def _of_kind(self, transfer: Transfer, slots: tuple[int, int, int]) -> BlockCopies:
        found = self._kinds.get((transfer, slots))
        if found is None:
            if len(self._kinds) >= _MAX_KINDS:
                self._kinds.clear()
            local_slot, remote_slot, num_slots = slots
            source = Region(self.source.layout, transfer.source, local_slot, num_slots)
            target = Region(self._target.layout, transfer.target, remote_slot, num_slots)
            table = _run_table(source, target, self._max_bytes)
            found = BlockCopies(self._target.flat, self.source.flat, table)
            self._kinds[transfer, slots] = found
        return found


def _run_table(source: Region, target: Region, max_bytes: int) -> RunTable:
    grain = min(source.grain(max_bytes), target.grain(max_bytes))
    source_offsets, lengths = source.runs(grain, max_bytes)
    target_offsets, _ = target.runs(grain, max_bytes)
    return RunTable(
        target_offsets,
        source_offsets,
        lengths,
        target.layout.block_bytes,
        source.layout.block_bytes,
    )
