"""Data plane on one host: the sender maps the receiver's pool and copies blocks into it.

What keeps a late writer out: each slice is copied under a lock of its lease (see `range_lock`),
and under the lock the writer looks at its deadline. To fence a lease the receiver takes its locks
alone and keeps them until the deadline has surely passed. A writer that was stopped in
the middle of a slice still holds the lock, so its blocks stay in quarantine until it goes on or
dies; no assumption about time is needed.
"""

import contextlib
import fcntl
import hmac
import mmap
import os
import re
import stat
import threading
from collections.abc import Sequence
from pathlib import Path

from engine.errors import KvCorruptionError, KvLeaseLostError, PeerUnavailableError
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.populate import populate
from kv_transfer import range_lock
from kv_transfer.blocks import BlockSource, HostBlocks
from kv_transfer.copy_plan import CopyPlan
from kv_transfer.memory import NONCE_BYTES, KvMemory
from kv_transfer.offer import ShmOffer
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.reshard import Transfer
from kv_transfer.slot_ranges import SlotRange

_PATH = re.compile(r"/proc/[1-9][0-9]{0,9}/fd/(0|[1-9][0-9]{0,6})")


class ShmWriter:
    """Copies into the pool of a process on this host."""

    name = "shm"

    def __init__(
        self,
        offer: ShmOffer,
        layout: KvLayout,
        num_blocks: int,
        *,
        slice_bytes: int,
        is_checked: bool = False,
    ) -> None:
        """Map the offered pool.

        Args:
            offer: of the receiving rank.
            layout: of its pool.
            num_blocks: in its pool.
            slice_bytes: most bytes between two looks at the lease.
            is_checked: compare what was written with its source.

        Raises:
            PeerUnavailableError: it is not there, not of the stated size, or another host's.
        """
        self._slice_bytes = slice_bytes
        self._is_checked = is_checked
        self.is_copying = not is_checked
        pool_bytes = num_blocks * layout.block_bytes
        self._fd = _open_offer(offer, pool_bytes)
        try:
            self._map = mmap.mmap(self._fd, offer.num_bytes)
        except OSError as error:
            os.close(self._fd)
            raise PeerUnavailableError(f"cannot map {offer.path}: {error}") from error
        nonce = self._map[pool_bytes : pool_bytes + NONCE_BYTES]
        if len(offer.nonce) != NONCE_BYTES or not hmac.compare_digest(nonce, offer.nonce):
            self._map.close()
            os.close(self._fd)
            raise PeerUnavailableError(f"{offer.path} is not the receiver's pool: another host?")
        self._blocks: HostBlocks | None = HostBlocks(layout, memoryview(self._map), num_blocks)
        self._plan: CopyPlan | None = None
        self._is_closed = threading.Event()
        self._populator = threading.Thread(target=self._populate, name="kv-map", daemon=True)
        self._populator.start()

    def write(
        self,
        permit: WritePermit,
        source: BlockSource,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
    ) -> int:
        plan = self._plan_for(source)
        num_bytes = 0
        for copies in plan.copies(source, parts, transfers):
            num_bytes += copies.num_bytes
            for first, end in copies.slices(self._slice_bytes):
                with range_lock.writing(self._fd, permit.lease_id) as is_open:
                    if not is_open:
                        raise KvLeaseLostError(f"the receiver took lease {permit.lease_id} back")
                    permit.check()
                    copies.copy(first, end)
                    if self._is_checked and not copies.are_done(first, end):
                        raise KvCorruptionError("shm: what was written is not what is there")
        return num_bytes

    def _plan_for(self, source: BlockSource) -> CopyPlan:
        """Kept for a pool; what was read from a device goes with its push."""
        plan = self._plan
        if plan is None or plan.source is not source.blocks:
            assert self._blocks is not None, "write after close"
            plan = CopyPlan(source.blocks, self._blocks, max_bytes=self._slice_bytes)
            if source.index_of is None:
                self._plan = plan
        return plan

    def close(self) -> None:
        if self._blocks is not None:
            self._is_closed.set()
            self._populator.join()
            self._plan = self._blocks = None  # the map cannot close under a view
            with contextlib.suppress(BufferError):  # a view in a traceback: it closes with that
                self._map.close()
            del self._map
            os.close(self._fd)

    def _populate(self) -> None:
        """Map the pool's pages ahead of the writes: faults would take longer than the copies."""
        with contextlib.suppress(OSError):  # pages come one by one then, on first use
            populate(self._map, is_wanted=lambda: not self._is_closed.is_set())


class ShmIntake:
    """The fence on the receiver's own pool."""

    def __init__(self, memory: KvMemory) -> None:
        """Raises ValueError when the pool is not in shared memory."""
        shared_fd, data = memory.shared_fd, memory.host_bytes
        if shared_fd is None or data is None:
            raise ValueError("the KV pool is not in shared memory")
        pool_bytes = memory.num_blocks * memory.layout.block_bytes
        self.offer = ShmOffer(
            path=f"/proc/{os.getpid()}/fd/{shared_fd}",
            num_bytes=os.fstat(shared_fd).st_size,
            nonce=os.pread(shared_fd, NONCE_BYTES, pool_bytes),
        )
        assert len(self.offer.nonce) == NONCE_BYTES, "the pool's file ends before its nonce"
        # An open of its own: locks belong to it, and end with it.
        self._fd = os.open(f"/proc/self/fd/{shared_fd}", os.O_RDWR | os.O_CLOEXEC)

    def open(self, window: WriteWindow) -> None:
        """Nothing to do: the writer's deadline and its lock are the gate."""

    def fence(self, lease_id: int, *, is_forced: bool) -> bool:
        return range_lock.fence(self._fd, lease_id)

    def forget(self, lease_id: int) -> None:
        range_lock.unfence(self._fd, lease_id)

    def close(self) -> None:
        os.close(self._fd)


def _open_offer(offer: ShmOffer, pool_bytes: int) -> int:
    """Open the file behind a path that a peer sent, once it is sure to be what it should be."""
    if not _PATH.fullmatch(offer.path):
        raise PeerUnavailableError(f"not a /proc/<pid>/fd/<n> path: {offer.path!r}")
    try:
        # A look before opening: opening a device or a pipe may have effects of its own.
        if not stat.S_ISREG(Path(offer.path).stat().st_mode):
            raise PeerUnavailableError(f"{offer.path} is not a memory file")
        fd = os.open(offer.path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise PeerUnavailableError(f"cannot open {offer.path}: {error.strerror}") from error
    status = os.fstat(fd)
    is_sound = (
        stat.S_ISREG(status.st_mode)
        and status.st_size == offer.num_bytes >= pool_bytes + NONCE_BYTES
        and _is_memfd(fd)
    )
    if not is_sound:
        os.close(fd)
        raise PeerUnavailableError(f"{offer.path} is not a memory file of {offer.num_bytes} bytes")
    return fd


def _is_memfd(fd: int) -> bool:
    """Only memory files know seals; a path that was swapped for one on a disk is refused."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True
