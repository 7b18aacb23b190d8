"""A sending rank in this process: its data planes and its writing threads."""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from engine.errors import LayoutMismatchError, PeerUnavailableError
from kv_transfer.blocks import HostBlocks, host_blocks, source_from
from kv_transfer.config import Checksums, DataPlane, TransferConfig, address_from
from kv_transfer.memory import KvMemory
from kv_transfer.offer import TcpOffer
from kv_transfer.plane import KvWriter, WritePermit
from kv_transfer.sending_rank import RankLink, Target
from kv_transfer.shm import ShmWriter
from kv_transfer.slot_ranges import SlotRange
from kv_transfer.tcp_writer import TcpWriter
from kv_transfer.tls import client_context

logger = logging.getLogger(__name__)

_WILDCARD_HOSTS = {"0.0.0.0", "::"}


@dataclass(frozen=True, slots=True)
class WriterChoice:
    """The data plane that works, and why a faster one does not."""

    writer: KvWriter
    fallback_reason: str | None


class LocalSendingRank:
    """Reads from `memory`."""

    def __init__(
        self,
        memory: KvMemory,
        config: TransferConfig,
        *,
        open_writer: Callable[[Target, TransferConfig], WriterChoice] | None = None,
    ) -> None:
        """Nothing is opened before the first link.

        Args:
            memory: the pool that is read from.
            config: see there.
            open_writer: how the data plane is chosen; for tests.
        """
        self._memory = memory
        self._host = host_blocks(memory)
        self._config = config
        self._open_writer = open_writer or choose_writer

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        loop = asyncio.get_running_loop()
        opening = loop.run_in_executor(None, self._open_writers, targets)
        try:
            choices = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)  # the thread goes on
            raise
        return LocalLink(self._memory, self._host, targets, choices)

    def _open_writers(self, targets: Sequence[Target]) -> list[WriterChoice]:
        choices: list[WriterChoice] = []
        try:
            choices.extend(self._open_writer(target, self._config) for target in targets)
        except BaseException:
            for choice in choices:
                choice.writer.close()
            raise
        return choices


def _close_opened(opening: asyncio.Future[list[WriterChoice]]) -> None:
    if opening.exception() is None:
        for choice in opening.result():
            choice.writer.close()


class LocalLink:
    """Writes in a thread of its own, one push at a time."""

    def __init__(
        self,
        memory: KvMemory,
        host: HostBlocks | None,
        targets: Sequence[Target],
        choices: Sequence[WriterChoice],
    ) -> None:
        self.data_planes: Sequence[str] = [choice.writer.name for choice in choices]
        self.fallback_reasons: Sequence[str] = [
            choice.fallback_reason for choice in choices if choice.fallback_reason
        ]
        self._memory = memory
        self._host = host
        self._writers = [
            (choice.writer, target.transfers)
            for choice, target in zip(choices, targets, strict=True)
        ]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-write")

    def write(self, permit: WritePermit, parts: Sequence[SlotRange]) -> asyncio.Future[int]:
        return asyncio.get_running_loop().run_in_executor(self._thread, self._write, permit, parts)

    def close(self) -> None:
        # The thread has nothing left to do: closing is its last job, so no one waits.
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _write(self, permit: WritePermit, parts: Sequence[SlotRange]) -> int:
        permit.check()
        source = source_from(self._memory, self._host, parts)
        return sum(
            writer.write(permit, source, parts, transfers) for writer, transfers in self._writers
        )

    def _close(self) -> None:
        for writer, _ in self._writers:
            writer.close()


def choose_writer(target: Target, config: TransferConfig) -> WriterChoice:
    """Open the fastest data plane that both ends have. Blocks for a moment: maps memory.

    Raises:
        PeerUnavailableError: the data plane that the settings ask for does not work.
        LayoutMismatchError: the settings of both ends leave none.
    """
    reason = None
    offer = target.offer
    if config.data_plane is not DataPlane.TCP and offer.shm is not None:
        try:
            writer = ShmWriter(
                offer.shm,
                target.layout,
                target.num_blocks,
                slice_bytes=config.slice_bytes,
                is_checked=config.checksums is Checksums.ALWAYS,
            )
        except PeerUnavailableError as error:
            if config.data_plane is DataPlane.SHM or offer.tcp is None:
                raise
            reason = "not_mappable"
            logger.info("no shared memory with %s: %s", target.name, error)
        else:
            return WriterChoice(writer, None)
    if config.data_plane is not DataPlane.SHM and offer.tcp is not None:
        return WriterChoice(_tcp_writer(offer.tcp, target, config), reason)
    raise LayoutMismatchError(
        f"data_plane is {config.data_plane} here but {target.name} offers"
        f" shm: {'yes' if offer.shm else 'no'}, tcp: {'yes' if offer.tcp else 'no'}"
    )


def _tcp_writer(offer: TcpOffer, target: Target, config: TransferConfig) -> TcpWriter:
    if offer.is_secured != config.is_secured:
        ends = (target.name, "this end") if offer.is_secured else ("this end", target.name)
        raise LayoutMismatchError(
            f"{ends[0]} speaks TLS on data connections but {ends[1]} does not: set tls_cert,"
            " tls_key and tls_ca at both ends"
        )
    host = offer.host
    if host in _WILDCARD_HOSTS:
        host = address_from(target.peer_address)[0]
    try:
        tls = client_context(config)
    except OSError as error:
        raise LayoutMismatchError(f"TLS of data connections: {error}") from error
    return TcpWriter(
        (host, offer.port),
        timeout_s=config.data_timeout_s,
        has_checksums=config.checksums is not Checksums.NEVER,
        num_connections=min(
            config.max_connections_per_peer, max(1, len(os.sched_getaffinity(0)) // 2)
        ),
        tls=tls,
    )
