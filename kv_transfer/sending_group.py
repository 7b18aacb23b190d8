"""A sending worker: its ranks, and what each of them has for a receiver's ranks."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

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
    """A link of a rank that holds the tokens of one shard."""

    token_shard: int
    link: RankLink


@dataclass(frozen=True, slots=True)
class SendingGroup:
    """Every rank of a worker, in rank order; rank 0's process holds it."""

    layout: GroupLayout
    ranks: Sequence[SendingRank]

    @classmethod
    def single(cls, memory: KvMemory, config: TransferConfig) -> "SendingGroup":
        """A worker of one rank."""
        return cls(GroupLayout.single(memory.layout), (LocalSendingRank(memory, config),))

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

        async def open_link(rank: int, targets: Sequence[Target]) -> None:
            link = await self.ranks[rank].open_link(targets)
            links.append(ShardLink(self.layout.boxes[rank].token_shard, link))

        targets_of = targets_by_rank(self.layout, offer, peer_address=peer_address)
        try:
            await together([open_link(rank, targets) for rank, targets in targets_of.items()])
        except BaseException:
            for shard_link in links:
                shard_link.link.close()
            raise
        return links


def targets_by_rank(
    layout: GroupLayout, offer: Offer, *, peer_address: str
) -> dict[int, list[Target]]:
    """The reshard plan, sorted by who has to do what."""
    targets_of: dict[int, list[Target]] = {}
    plan = reshard_plan(layout, offer.layout)
    for (rank, receiver_rank), transfers in groupby(
        plan, key=lambda transfer: (transfer.sender_rank, transfer.receiver_rank)
    ):
        target = Target(
            name=offer.rank_name(receiver_rank),
            offer=offer.ranks[receiver_rank],
            layout=offer.layout.rank_layout(receiver_rank),
            num_blocks=offer.num_blocks,
            peer_address=peer_address,
            transfers=tuple(transfers),
        )
        targets_of.setdefault(rank, []).append(target)
    return targets_of
