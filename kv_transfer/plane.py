"""The two ends of a data plane: what the sender writes through, what the receiver lets in."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import IsthmusError, KvLeaseLostError
from kv_transfer.blocks import BlockSource
from kv_transfer.reshard import Transfer
from kv_transfer.slot_ranges import SlotRange


class WriteStoppedError(IsthmusError):
    """The sender itself has ended the handover; nothing more was written."""


@dataclass(slots=True)
class WritePermit:
    """The sender's right to write under one lease; shared by the loop and the writing thread."""

    lease_id: int
    epoch: int
    clock: Callable[[], float]
    deadline_s: float
    """By `clock`; never later than the receiver's own end of the lease. Moved by renewals."""
    stopped: threading.Event = field(default_factory=threading.Event)
    on_change: set[Callable[[], None]] = field(default_factory=set)
    """Called on the loop when the permit is moved or stopped; for writes in other processes."""

    def move(self, deadline_s: float) -> None:
        """Set another deadline. Loop only."""
        self.deadline_s = deadline_s
        self._tell()

    def stop(self) -> None:
        """Let nothing more be written. Loop only."""
        self.stopped.set()
        self._tell()

    def check(self) -> None:
        """Call before each slice.

        Raises:
            WriteStoppedError: the handover was given up here.
            KvLeaseLostError: the lease may be over.
        """
        if self.stopped.is_set():
            raise WriteStoppedError("the handover was given up by its sender")
        if self.clock() >= self.deadline_s:
            raise KvLeaseLostError(f"lease {self.lease_id} ended before its blocks were written")

    def _tell(self) -> None:
        for tell in list(self.on_change):
            tell()


class KvWriter(Protocol):
    """A sending rank's end, for one receiving rank. One thread at a time writes; it blocks."""

    name: str
    """Label of the data plane in reports and metrics."""
    is_copying: bool
    """A write is a copy in memory and nothing else."""

    def write(
        self,
        permit: WritePermit,
        source: BlockSource,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
    ) -> int:
        """Write the boxes of `transfers` of all `parts`; returns the payload bytes.

        When it returns, the bytes are in the receiver's blocks. When it raises, nothing more is
        written under this call.

        Raises:
            KvLeaseLostError: the receiver has taken the blocks back, or the lease ended.
            KvCorruptionError: bytes arrived damaged.
            PeerUnavailableError: the receiver cannot be reached.
            WriteStoppedError: `permit` was stopped.
        """

    def close(self) -> None:
        """Drop what is held for the receiver; no write is under way."""


@dataclass(frozen=True, slots=True)
class WriteWindow:
    """What a writer may write under a lease: tokens [first_token, end_token) of these blocks."""

    lease_id: int
    block_ids: tuple[int, ...]
    first_token: int
    end_token: int


class KvIntake(Protocol):
    """The receiver's end, for all senders. Loop only; never blocks."""

    def open(self, window: WriteWindow) -> None:
        """From now on, writes inside `window` are let in."""

    def fence(self, lease_id: int, *, is_forced: bool) -> bool:
        """Let no new write under the lease begin; True once none is under way either.

        Call again until it is True: only then may the blocks be used for something else.

        Args:
            lease_id: of a lease that was opened; unknown ids are fenced already.
            is_forced: cut off a peer that is in the middle of a write.
        """

    def forget(self, lease_id: int) -> None:
        """The lease ended long ago: its deadline alone keeps writers out."""

    def close(self) -> None:
        """Let nothing in any more and free threads and descriptors."""
