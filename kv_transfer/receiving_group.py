"""A receiving worker: all of its ranks do what a lease on its blocks asks for."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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

    The methods are those of `ReceivingRank`, for all ranks at once.
    """

    layout: GroupLayout
    num_blocks: int
    """In every rank's pool."""
    ranks: Sequence[ReceivingRank]

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
        await together([rank.open(window) for rank in self.ranks])

    async def fence(self, lease_id: int) -> None:
        await together([rank.fence(lease_id) for rank in self.ranks])

    async def forget(self, lease_ids: Sequence[int]) -> None:
        await together([rank.forget(lease_ids) for rank in self.ranks])

    async def stop(self) -> None:
        await together([rank.stop() for rank in self.ranks])
