"""What a sender knows about one start of one receiver: offer, links, open handovers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from engine.errors import IsthmusError
from kv_transfer.offer import Offer
from kv_transfer.sending_group import ShardLink
from kv_transfer.sending_rank import RankLink
from kv_transfer.slot_ranges import SlotRange

if TYPE_CHECKING:
    from kv_transfer.plane import WritePermit


class Session:
    """Lives until its last handover has left it."""

    def __init__(self, offer: Offer, links: Sequence[ShardLink], *, lease_s: float) -> None:
        self.offer = offer
        planes = {name for shard_link in links for name in shard_link.link.data_planes}
        self.data_plane = "+".join(sorted(planes))
        """Label in reports and metrics; a group may reach its targets in several ways."""
        self.fallback_reasons = [
            reason for shard_link in links for reason in shard_link.link.fallback_reasons
        ]
        self.permits: dict[int, WritePermit] = {}
        """The handovers that are open, by lease."""
        self.lease_s = lease_s
        """What to ask for: never more than the receiver has granted."""
        self._links = links
        self._num_users = 1

    def enter(self) -> None:
        self._num_users += 1

    def leave(self) -> None:
        """Gives up threads and descriptors with the last user; no write is under way then."""
        self._num_users -= 1
        if self._num_users == 0:
            for shard_link in self._links:
                shard_link.link.close()

    def work_for(
        self,
        parts_of_shard: Mapping[int, Sequence[SlotRange]],
        *,
        data_shard: int,
        receiver_shard: int,
    ) -> list[tuple[RankLink, Sequence[SlotRange]]]:
        """Which rank writes what of these tokens.

        Args:
            parts_of_shard: by token shard; blocks as the ranks' pools count them.
            data_shard: here.
            receiver_shard: there.
        """
        shards = data_shard, receiver_shard
        return [
            (shard_link.link, parts)
            for shard_link in self._links
            if (shard_link.data_shard, shard_link.receiver_shard) == shards
            and (parts := parts_of_shard.get(shard_link.token_shard))
        ]


def outcome_of(error: BaseException) -> str:
    """A metric label for how a handover ended that was not committed."""
    if isinstance(error, IsthmusError):
        return type(error).__name__
    return "error" if isinstance(error, Exception) else "released"
