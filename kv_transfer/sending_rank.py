"""What rank 0 asks of each rank of a sending worker, itself included."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.kv_cache.layout import KvLayout
from kv_transfer.offer import RankOffer
from kv_transfer.plane import WritePermit
from kv_transfer.reshard import Transfer
from kv_transfer.slot_ranges import SlotRange


@dataclass(frozen=True, slots=True)
class Target:
    """A receiving rank, and what a sending rank has for it."""

    name: str
    """For texts."""
    offer: RankOffer
    layout: KvLayout
    """Of the receiving rank's pool."""
    num_blocks: int
    peer_address: str
    """host:port of the receiver's gRPC server: a wildcard data address means this host."""
    transfers: tuple[Transfer, ...]


@dataclass(frozen=True, slots=True)
class Written:
    """What a write came to."""

    num_bytes: int
    """Payload."""
    write_ns: int
    """Time spent writing, not waiting for KV to be computed."""


class RankLink(Protocol):
    """From one sending rank to all ranks of one receiver that it has something for. Loop only."""

    data_planes: Sequence[str]
    """By target: which way the bytes take."""
    fallback_reasons: Sequence[str]
    """Why a faster data plane does not work; one for each target where that is so."""

    def write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None = None
    ) -> asyncio.Future[Written]:
        """Write `parts` to every target.

        With a `step` of this worker's engine each layer goes as soon as that step has written it on
        this rank, whatever other ranks have come to; without one all is there.

        The future ends when nothing more is written, and is not cancelled. It raises what
        `KvWriter.write` raises, and RankDeadError when the rank's process is gone.
        """

    def close(self) -> None:
        """Drop what is held for the receiver; no write is under way."""


class SendingRank(Protocol):
    """One rank's pool, as a source. Loop only."""

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        """Open the fastest data plane to each target.

        Raises:
            PeerUnavailableError: the data plane that the settings ask for does not work.
            LayoutMismatchError: the settings of both ends leave none.
            RankDeadError: the rank's process is gone.
        """
