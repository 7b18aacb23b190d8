"""A sending rank in this process: its data planes and its writing threads."""

import asyncio
import logging
import os
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from engine.errors import LayoutMismatchError, PeerUnavailableError
from kv_transfer.blocks import HostBlocks, host_blocks, source_from
from kv_transfer.computed import layers_computed
from kv_transfer.config import Checksums, DataPlane, TransferConfig, address_from
from kv_transfer.memory import KvMemory
from kv_transfer.nixl_writer import NixlWriter
from kv_transfer.offer import WILDCARD_HOSTS, NixlOffer, ShmOffer, TcpOffer
from kv_transfer.plane import KvWriter, WritePermit
from kv_transfer.reshard import of_layers
from kv_transfer.sending_rank import RankLink, Target, Written
from kv_transfer.shm import ShmWriter
from kv_transfer.slot_ranges import SlotRange, SlotRanges
from kv_transfer.tcp_writer import tcp_writer
from kv_transfer.tls import client_context

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WriterChoice:
    """The data plane that works, and why a faster one does not."""

    writer: KvWriter
    fallback_reason: str | None


QUICK_BYTES = 1 << 20
"""A push of less is written at once where that is a copy: handing it to a thread and back takes
longer than the copy, and more of the loop's own time than this takes."""

OpenWriter = Callable[[Target, TransferConfig, HostBlocks | None], WriterChoice]


class LocalSendingRank:
    """Reads from `memory`."""

    def __init__(
        self,
        memory: KvMemory,
        config: TransferConfig,
        *,
        open_writer: OpenWriter | None = None,
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
            choices.extend(
                self._open_writer(target, self._config, self._host) for target in targets
            )
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
    """Writes a push or some layers of it at a time: in a thread, or at once what is soon copied."""

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
        self._jobs: set[Future[Written]] = set()
        """Of the thread, until they have ended there: whoever waits for one may be gone."""
        is_copied = host is not None and all(writer.is_copying for writer, _ in self._writers)
        slot_bytes = sum(t.source.num_cells for target in targets for t in target.transfers)
        slot_bytes *= memory.layout.bytes_per_cell
        self._most_quick_slots = QUICK_BYTES // max(1, slot_bytes) if is_copied else 0

    def write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None = None
    ) -> asyncio.Future[Written]:
        progress = self._memory.progress
        if step is None or progress.layers_of(step) == progress.num_layers:
            return self._write_now(permit, parts, None)
        # Held and waited for by whoever asked, which is why no task group holds it here.
        return asyncio.ensure_future(self._write_step(permit, parts, step))

    async def _write_step(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int
    ) -> Written:
        progress = self._memory.progress
        num_bytes = write_ns = num_layers = 0
        while num_layers < progress.num_layers:
            end = await layers_computed(progress, step, num_layers, permit)
            written = await self._write_now(permit, parts, range(num_layers, end))
            num_bytes += written.num_bytes
            write_ns += written.write_ns
            num_layers = end
        return Written(num_bytes, write_ns)

    def _write_now(
        self, permit: WritePermit, parts: Sequence[SlotRange], layers: range | None
    ) -> asyncio.Future[Written]:
        loop = asyncio.get_running_loop()
        most_slots = self._most_quick_slots
        if most_slots and not self._jobs and SlotRanges.of(parts).num_slots <= most_slots:
            return self._write_at_once(loop.create_future(), permit, parts, layers)
        job = self._thread.submit(self._write, permit, parts, layers)
        self._jobs.add(job)
        job.add_done_callback(self._jobs.discard)
        return asyncio.wrap_future(job, loop=loop)

    def close(self) -> None:
        # The thread has nothing left to do: closing is its last job, so no one waits.
        self._thread.submit(self._close)
        self._thread.shutdown(wait=False)

    def _write_at_once(
        self,
        written: asyncio.Future[Written],
        permit: WritePermit,
        parts: Sequence[SlotRange],
        layers: range | None,
    ) -> asyncio.Future[Written]:
        try:
            written.set_result(self._write(permit, parts, layers))
        except Exception as error:  # noqa: BLE001 - raised where it is awaited
            written.set_exception(error)
        return written

    def _write(
        self, permit: WritePermit, parts: Sequence[SlotRange], layers: range | None
    ) -> Written:
        start_ns = time.monotonic_ns()
        try:
            num_bytes = self._write_to_all(permit, parts, layers)
            return Written(num_bytes, time.monotonic_ns() - start_ns)
        except BaseException as error:
            # It may be kept for long; views of the receiver's pool in its frames would keep that.
            traceback.clear_frames(error.__traceback__)
            raise

    def _write_to_all(
        self, permit: WritePermit, parts: Sequence[SlotRange], layers: range | None
    ) -> int:
        permit.check()
        source = source_from(self._memory, self._host, parts)
        num_bytes = 0
        for writer, transfers in self._writers:
            wanted = transfers if layers is None else of_layers(transfers, layers)
            if wanted:
                num_bytes += writer.write(permit, source, parts, wanted)
        return num_bytes

    def _close(self) -> None:
        for writer, _ in self._writers:
            try:
                writer.close()
            except Exception:
                logger.exception("%s writer not closed", writer.name)


def choose_writer(target: Target, config: TransferConfig, host: HostBlocks | None) -> WriterChoice:
    """Open the fastest data plane that both ends have. Blocks for a moment: maps memory.

    Raises:
        PeerUnavailableError: the data plane that the settings ask for does not work.
        LayoutMismatchError: the settings of both ends leave none.
    """
    wanted, offer = config.data_plane, target.offer
    openers: list[tuple[DataPlane, str, Callable[[], KvWriter]]] = []
    if (shm := offer.shm) is not None:
        openers.append((DataPlane.SHM, "not_mappable", lambda: _shm_writer(shm, target, config)))
    if (nixl := offer.nixl) is not None and not config.is_secured:
        openers.append(
            (DataPlane.NIXL, "no_nixl", lambda: _nixl_writer(nixl, target, config, host))
        )
    if (tcp := offer.tcp) is not None:
        openers.append((DataPlane.TCP, "no_tcp", lambda: _tcp_writer(tcp, target, config)))
    openers = [opener for opener in openers if wanted in (DataPlane.AUTO, opener[0])]
    fallback_reason = None
    for index, (plane, reason, open_writer) in enumerate(openers):
        try:
            return WriterChoice(open_writer(), fallback_reason)
        except PeerUnavailableError as error:
            if index == len(openers) - 1:
                raise
            fallback_reason = reason
            logger.info("no %s with %s: %s", plane, target.name, error)
    offered = {"shm": offer.shm, "tcp": offer.tcp, "nixl": offer.nixl}
    raise LayoutMismatchError(
        f"data_plane is {wanted} here but {target.name} offers "
        + ", ".join(f"{name}: {'yes' if offered[name] else 'no'}" for name in offered)
    )


def _shm_writer(offer: ShmOffer, target: Target, config: TransferConfig) -> KvWriter:
    return ShmWriter(
        offer,
        target.layout,
        target.num_blocks,
        slice_bytes=config.slice_bytes,
        is_checked=config.checksums is Checksums.ALWAYS,
    )


def _nixl_writer(
    offer: NixlOffer, target: Target, config: TransferConfig, host: HostBlocks | None
) -> KvWriter:
    if host is None:
        raise PeerUnavailableError("the KV pool here is not host memory, which nixl needs")
    return NixlWriter(
        (_reachable(offer.host, target), offer.port),
        host,
        target.layout,
        timeout_s=config.data_timeout_s,
        has_checksums=config.checksums is Checksums.ALWAYS,
    )


def _tcp_writer(offer: TcpOffer, target: Target, config: TransferConfig) -> KvWriter:
    if offer.is_secured != config.is_secured:
        ends = (target.name, "this end") if offer.is_secured else ("this end", target.name)
        raise LayoutMismatchError(
            f"{ends[0]} speaks TLS on data connections but {ends[1]} does not: set tls_cert,"
            " tls_key and tls_ca at both ends"
        )
    try:
        tls = client_context(config)
    except OSError as error:
        raise LayoutMismatchError(f"TLS of data connections: {error}") from error
    return tcp_writer(
        (_reachable(offer.host, target), offer.port),
        timeout_s=config.data_timeout_s,
        has_checksums=config.checksums is not Checksums.NEVER,
        num_connections=min(
            config.max_connections_per_peer, max(1, len(os.sched_getaffinity(0)) // 2)
        ),
        tls=tls,
    )


def _reachable(host: str, target: Target) -> str:
    """The receiver's host, also where it listens on all addresses."""
    return address_from(target.peer_address)[0] if host in WILDCARD_HOSTS else host
