"""A sending worker: its ranks, and what each of them has for a receiver's ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, product

from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.memory import KvMemory
from kv_transfer.offer import Offer
from kv_transfer.reshard import reshard_plan
from kv_transfer.sending_rank import RankLink, SendingRank, Target
from kv_transfer.together import together


@dataclass(frozen=True, slots=True)
class ShardLink:
    """A link of a rank that holds the tokens of one shard, to one data shard of the receiver."""

    token_shard: int
    data_shard: int
    """Of the rank."""
    receiver_shard: int
    link: RankLink


@dataclass(frozen=True, slots=True)
class SendingGroup:
    """Every rank of a worker, in rank order; rank 0's process holds it."""

    layout: GroupLayout
    num_blocks: int
    """In every rank's pool."""
    ranks: Sequence[SendingRank]

    @classmethod
    def single(cls, memory: KvMemory, config: TransferConfig) -> "SendingGroup":
        """A worker of one rank."""
        rank = LocalSendingRank(memory, config)
        return cls(GroupLayout.single(memory.layout), memory.num_blocks, (rank,))

    def __post_init__(self) -> None:
        if len(self.ranks) != self.layout.num_ranks:
            raise ValueError(f"{len(self.ranks)} ranks, but boxes of {self.layout.num_ranks}")

    async def open_links(self, offer: Offer, *, peer_address: str) -> list[ShardLink]:
        """Link every rank that has something to send with those that it is for.

        Raises:
            PeerUnavailableError, LayoutMismatchError, RankDeadError: as `SendingRank.open_link`;
                nothing is left open.
        """
        links: list[ShardLink] = []

        async def open_link(rank: int, receiver_shard: int, targets: Sequence[Target]) -> None:
            link = await self.ranks[rank].open_link(targets)
            box = self.layout.boxes[rank]
            links.append(ShardLink(box.token_shard, box.data_shard, receiver_shard, link))

        targets_of = targets_by_rank(self.layout, offer, peer_address=peer_address)
        try:
            await together(
                [open_link(rank, shard, targets) for (rank, shard), targets in targets_of.items()]
            )
        except BaseException:
            for shard_link in links:
                shard_link.link.close()
            raise
        return links


def targets_by_rank(
    layout: GroupLayout, offer: Offer, *, peer_address: str
) -> dict[tuple[int, int], list[Target]]:
    """The reshard plan, sorted by who has to do what: by rank and the receiver's data shard."""
    targets_of: dict[tuple[int, int], list[Target]] = {}
    plan = reshard_plan(layout.one_shard, offer.layout.one_shard)
    shards = product(range(layout.num_data_shards), range(offer.layout.num_data_shards))
    for data_shard, receiver_shard in shards:
        ranks = layout.shard_ranks(data_shard)
        receiver_ranks = offer.layout.shard_ranks(receiver_shard)
        for (place, receiver_place), transfers in groupby(
            plan, key=lambda transfer: (transfer.sender_rank, transfer.receiver_rank)
        ):
            receiver_rank = receiver_ranks[receiver_place]
            target = Target(
                name=offer.rank_name(receiver_rank),
                offer=offer.ranks[receiver_rank],
                layout=offer.layout.rank_layout(receiver_rank),
                num_blocks=offer.num_blocks,
                peer_address=peer_address,
                transfers=tuple(transfers),
            )
            targets_of.setdefault((ranks[place], receiver_shard), []).append(target)
    return targets_of
