"""A receiving worker: all of its ranks do what a lease on its blocks asks for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engine.scheduling.data_shard import pool_blocks
from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.memory import KvMemory
from kv_transfer.offer import RankOffer
from kv_transfer.plane import KvIntake, WriteWindow
from kv_transfer.receiving_rank import ReceivingRank
from kv_transfer.together import together


@dataclass(frozen=True, slots=True)
class ReceivingGroup:
    """Every rank of a worker, in rank order; rank 0's process holds it.

    The methods are those of `ReceivingRank`, for all ranks at once, or all of the data shard that a
    lease's blocks are of.
    """

    layout: GroupLayout
    num_blocks: int
    """In every rank's pool."""
    ranks: Sequence[ReceivingRank]
    _shard_of_lease: dict[int, int] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def single(
        cls, memory: KvMemory, config: TransferConfig, *, other_planes: Sequence[KvIntake] = ()
    ) -> "ReceivingGroup":
        """A worker of one rank."""
        rank = LocalReceivingRank(memory, config, other_planes=other_planes)
        return cls(GroupLayout.single(memory.layout), memory.num_blocks, (rank,))

    def __post_init__(self) -> None:
        if len(self.ranks) != self.layout.num_ranks:
            raise ValueError(f"{len(self.ranks)} ranks, but boxes of {self.layout.num_ranks}")

    @property
    def dropped(self) -> Mapping[str, int]:
        dropped: Counter[str] = Counter()
        for rank in self.ranks:
            dropped.update(rank.dropped)
        return dict(dropped)

    async def start(self, epoch: int) -> tuple[RankOffer, ...]:
        try:
            return tuple(await together([rank.start(epoch) for rank in self.ranks]))
        except BaseException:
            await self.stop()
            raise

    async def open(self, window: WriteWindow) -> None:
        shard, block_ids = pool_blocks(window.block_ids, self.num_blocks)
        self._shard_of_lease[window.lease_id] = shard
        in_pool = replace(window, block_ids=block_ids)
        await together([rank.open(in_pool) for rank in self._ranks_of(window.lease_id)])

    async def fence(self, lease_id: int) -> None:
        await together([rank.fence(lease_id) for rank in self._ranks_of(lease_id)])

    async def forget(self, lease_ids: Sequence[int]) -> None:
        await together([rank.forget(lease_ids) for rank in self.ranks])
        for lease_id in lease_ids:
            self._shard_of_lease.pop(lease_id, None)

    async def stop(self) -> None:
        await together([rank.stop() for rank in self.ranks])

    def _ranks_of(self, lease_id: int) -> list[ReceivingRank]:
        """Those that were, or would have been, told of a lease's window."""
        if self.layout.num_data_shards == 1:
            return list(self.ranks)
        shard = self._shard_of_lease.get(lease_id)
        return [] if shard is None else [self.ranks[r] for r in self.layout.shard_ranks(shard)]
