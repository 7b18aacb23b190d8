"""What a sender knows about one start of one receiver: offer, data plane, writing thread."""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.errors import IsthmusError, LayoutMismatchError, PeerUnavailableError
from kv_transfer.blocks import HostBlocks, SlotRange, source_from
from kv_transfer.config import DataPlane, TransferConfig, address_from
from kv_transfer.memory import KvMemory
from kv_transfer.offer import Offer
from kv_transfer.plane import KvWriter, WritePermit
from kv_transfer.shm import ShmWriter
from kv_transfer.tcp_writer import TcpWriter

logger = logging.getLogger(__name__)

_WILDCARD_HOSTS = {"0.0.0.0", "::"}


class Session:
    """Writes to one receiver, one push at a time; lives until its last handover has left it."""

    def __init__(self, offer: Offer, writer: KvWriter, *, lease_s: float) -> None:
        self.offer = offer
        self.data_plane = writer.name
        self.permits: dict[int, WritePermit] = {}
        """The handovers that are open, by lease."""
        self.lease_s = lease_s
        """What to ask for: never more than the receiver has granted."""
        self._writer = writer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-write")
        self._num_users = 1

    def enter(self) -> None:
        self._num_users += 1

    def leave(self) -> None:
        """Gives up threads and descriptors with the last user; no write is under way then."""
        self._num_users -= 1
        if self._num_users == 0:
            # The thread has nothing left to do: closing is its last job, so no one waits.
            self._thread.submit(self._writer.close)
            self._thread.shutdown(wait=False)

    def write(
        self,
        permit: WritePermit,
        memory: KvMemory,
        host: HostBlocks | None,
        parts: Sequence[SlotRange],
    ) -> asyncio.Future[int]:
        """Write `parts` in the session's thread, after what was asked for before."""

        def work() -> int:
            permit.check()
            return self._writer.write(permit, source_from(memory, host, parts), parts)

        return asyncio.get_running_loop().run_in_executor(self._thread, work)


@dataclass(frozen=True, slots=True)
class WriterChoice:
    """The data plane that works, and why a faster one does not."""

    writer: KvWriter
    fallback_reason: str | None


def choose_writer(offer: Offer, config: TransferConfig, *, peer_address: str) -> WriterChoice:
    """Open the fastest data plane that both ends have. Blocks for a moment: maps memory.

    Raises:
        PeerUnavailableError: the data plane that the settings ask for does not work.
        LayoutMismatchError: the settings of both ends leave none.
    """
    reason = None
    if config.data_plane is not DataPlane.TCP and offer.shm is not None:
        try:
            writer = ShmWriter(
                offer.shm, offer.layout, offer.num_blocks, slice_bytes=config.slice_bytes
            )
        except PeerUnavailableError as error:
            if config.data_plane is DataPlane.SHM or offer.tcp is None:
                raise
            reason = "not_mappable"
            logger.info("no shared memory with %s: %s", offer.receiver_id, error)
        else:
            return WriterChoice(writer, None)
    if config.data_plane is not DataPlane.SHM and offer.tcp is not None:
        host, port = offer.tcp.host, offer.tcp.port
        if host in _WILDCARD_HOSTS:
            host = address_from(peer_address)[0]
        return WriterChoice(
            TcpWriter(
                (host, port), timeout_s=config.data_timeout_s, has_checksums=config.has_checksums
            ),
            reason,
        )
    raise LayoutMismatchError(
        f"data_plane is {config.data_plane} here but {offer.receiver_id} offers"
        f" shm: {'yes' if offer.shm else 'no'}, tcp: {'yes' if offer.tcp else 'no'}"
    )


def outcome_of(error: BaseException) -> str:
    """A metric label for how a handover ended that was not committed."""
    if isinstance(error, IsthmusError):
        return type(error).__name__
    return "error" if isinstance(error, Exception) else "released"
