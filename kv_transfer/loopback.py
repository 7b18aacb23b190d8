"""Data plane inside one process, for tests: the writer copies into the receiver's memory."""

import threading
from collections.abc import Sequence

from engine.errors import KvLeaseLostError
from kv_transfer.blocks import BlockSource, HostBlocks
from kv_transfer.copy_plan import CopyPlan
from kv_transfer.memory import KvMemory
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.reshard import Transfer
from kv_transfer.slot_ranges import SlotRange


class LoopbackIntake:
    """Lets writers of this process into `memory`."""

    def __init__(self, memory: KvMemory) -> None:
        data = memory.host_bytes
        if data is None:
            raise ValueError("the KV pool is not host memory")
        self.blocks = HostBlocks(memory.layout, data, memory.num_blocks)
        self._lock = threading.Lock()
        self._open: set[int] = set()
        self._busy: set[int] = set()

    def open(self, window: WriteWindow) -> None:
        with self._lock:
            self._open.add(window.lease_id)

    def fence(self, lease_id: int, *, is_forced: bool) -> bool:
        with self._lock:
            self._open.discard(lease_id)
            return lease_id not in self._busy

    def forget(self, lease_id: int) -> None:
        """Nothing is remembered about a fenced lease."""

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def begin(self, lease_id: int) -> None:
        """A slice is about to be written; raises KvLeaseLostError when the lease is fenced."""
        with self._lock:
            if lease_id not in self._open:
                raise KvLeaseLostError(f"the receiver took lease {lease_id} back")
            self._busy.add(lease_id)

    def end(self, lease_id: int) -> None:
        with self._lock:
            self._busy.discard(lease_id)


class LoopbackWriter:
    name = "loopback"
    is_copying = True

    def __init__(self, intake: LoopbackIntake, *, slice_bytes: int) -> None:
        self._intake = intake
        self._slice_bytes = slice_bytes

    def write(
        self,
        permit: WritePermit,
        source: BlockSource,
        parts: Sequence[SlotRange],
        transfers: Sequence[Transfer],
    ) -> int:
        num_bytes = 0
        plan = CopyPlan(source.blocks, self._intake.blocks, max_bytes=self._slice_bytes)
        for copies in plan.copies(source, parts, transfers):
            num_bytes += copies.num_bytes
            for first, end in copies.slices(self._slice_bytes):
                self._intake.begin(permit.lease_id)
                try:
                    permit.check()
                    copies.copy(first, end)
                finally:
                    self._intake.end(permit.lease_id)
        return num_bytes

    def close(self) -> None:
        """Holds nothing."""
