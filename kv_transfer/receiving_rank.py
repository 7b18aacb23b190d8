"""What rank 0 asks of each rank of a receiving worker, itself included."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from kv_transfer.offer import RankOffer
from kv_transfer.plane import WriteWindow


class ReceivingRank(Protocol):
    """One rank's pool, as a target. Loop only.

    Every method raises RankDeadError when the rank's process is gone.
    """

    @property
    def dropped(self) -> Mapping[str, int]:
        """Data connections closed from this side, by reason."""

    async def start(self, epoch: int) -> RankOffer:
        """Open the data planes.

        Raises:
            OSError: the data address cannot be bound.
            ValueError: the settings leave no data plane.
        """

    async def open(self, window: WriteWindow) -> None:
        """Let writes inside `window` in, unless its lease was fenced before."""

    async def fence(self, lease_id: int) -> None:
        """Let no new write under the lease begin; returns when none is under way either."""

    async def forget(self, lease_ids: Sequence[int]) -> None:
        """The leases ended long ago: their deadlines alone keep writers out."""

    async def stop(self) -> None:
        """Let nothing in any more and free threads and descriptors; harmless when not started."""
