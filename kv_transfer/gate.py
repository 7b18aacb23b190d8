"""Which frames the receiver lets in, and who is in the middle of one."""

import threading
from collections.abc import Sequence
from typing import Protocol

from engine.kv_cache.layout import KvLayout
from engine.parallel.layout import MAX_RANKS
from kv_transfer.frame import MAX_BLOCKS, FrameError, FrameHeader
from kv_transfer.plane import WriteWindow

FRAME_BYTES = 4 << 20
"""Most payload of a frame on a socket, where one block is not larger."""


def blocks_of_frame(bytes_of_block: int, frame_bytes: int) -> int:
    """The most that one frame has."""
    return max(1, min(MAX_BLOCKS, frame_bytes // bytes_of_block))


class Cuttable(Protocol):
    """Whoever receives a frame's payload."""

    def shutdown(self) -> None:
        """Make it end soon; from any thread."""


class _OpenLease:
    """What may be written under a lease, and by which push of each writer."""

    def __init__(self, window: WriteWindow, block_size_tokens: int) -> None:
        self._window = window
        self._block_size_tokens = block_size_tokens
        self._place_of = {block_id: place for place, block_id in enumerate(window.block_ids)}
        first, end = (
            -(-window.first_token // block_size_tokens),
            window.end_token // block_size_tokens,
        )
        self._whole_ids = frozenset(window.block_ids[first:end])
        """Of blocks all of whose slots are inside the window."""
        self.newest_push: dict[int, int] = {}

    def check_place(self, header: FrameHeader, block_ids: Sequence[int]) -> None:
        """Raises FrameError unless all slots of the frame are inside the window."""
        if self._whole_ids.issuperset(block_ids):
            return
        for block_id in block_ids:
            place = self._place_of.get(block_id)
            if place is None:
                raise FrameError("foreign_block")
            first = place * self._block_size_tokens + header.first_slot
            if (
                first < self._window.first_token
                or first + header.num_slots > self._window.end_token
            ):
                raise FrameError("foreign_slots")


class Gate:
    """Leases and their writers; the loop and the receiving threads share it."""

    def __init__(self, epoch: int, layout: KvLayout, *, frame_bytes: int = FRAME_BYTES) -> None:
        self._epoch = epoch
        self._layout = layout
        self._frame_bytes = frame_bytes
        self._lock = threading.Lock()
        self._has_left = threading.Condition(self._lock)
        self._open: dict[int, _OpenLease] = {}
        self._fenced: set[int] = set()
        self._busy: dict[int, dict[Cuttable, FrameHeader]] = {}

    def open(self, window: WriteWindow) -> None:
        opened = _OpenLease(window, self._layout.block_size_tokens)
        with self._lock:
            if window.lease_id not in self._fenced:  # an abort may come before the news of a grant
                self._open[window.lease_id] = opened

    def fence(self, lease_id: int) -> list[Cuttable]:
        """Shut the lease; returns who is in the middle of a frame of it."""
        with self._lock:
            self._open.pop(lease_id, None)
            self._fenced.add(lease_id)
            return list(self._busy.get(lease_id, ()))

    def forget(self, lease_id: int) -> None:
        with self._lock:
            self._fenced.discard(lease_id)

    def check_shape(self, header: FrameHeader) -> None:
        """Raises FrameError for a frame that no lease can allow; bounds what it takes in."""
        layout, box = self._layout, header.box
        if header.epoch != self._epoch:
            raise FrameError("stale_epoch")
        if not 1 <= header.num_slots <= layout.block_size_tokens:
            raise FrameError("bad_slots")
        if header.first_slot + header.num_slots > layout.block_size_tokens:
            raise FrameError("foreign_slots")
        if not box.is_inside(layout):
            raise FrameError("bad_box")
        bytes_of_block = header.num_slots * box.num_cells * layout.bytes_per_cell
        if not 1 <= header.num_blocks <= blocks_of_frame(bytes_of_block, self._frame_bytes):
            raise FrameError("bad_length")
        if header.num_bytes != header.num_blocks * bytes_of_block:
            raise FrameError("bad_length")

    def enter(self, header: FrameHeader, block_ids: Sequence[int], connection: Cuttable) -> bool:
        """Let a frame of sound shape in; False when its payload must go nowhere.

        That is so when its lease was shut, and when its writer has begun a later push: damaged or
        late bytes of a push that was given up must not fall on those of its repetition. Waits for
        the last frames of the earlier push that are under way, whose connections are cut.
        """
        with self._lock:
            while True:
                if header.lease_id in self._fenced:
                    return False
                opened = self._open.get(header.lease_id)
                if opened is None:
                    raise FrameError("unknown_lease")
                opened.check_place(header, block_ids)
                if not self._is_newest(header, opened):
                    return False
                late = self._earlier(header)
                if not late:
                    break
                for other in late:
                    other.shutdown()
                self._has_left.wait()
            self._busy.setdefault(header.lease_id, {})[connection] = header
            return True

    def leave(self, header: FrameHeader, connection: Cuttable) -> None:
        with self._lock:
            writers = self._busy[header.lease_id]
            del writers[connection]
            if not writers:
                del self._busy[header.lease_id]
            self._has_left.notify_all()

    def _is_newest(self, header: FrameHeader, opened: _OpenLease) -> bool:
        newest = opened.newest_push
        if header.writer_id not in newest and len(newest) >= MAX_RANKS:
            raise FrameError("too_many_writers")
        newest[header.writer_id] = max(header.push, newest.get(header.writer_id, 0))
        return newest[header.writer_id] == header.push

    def _earlier(self, header: FrameHeader) -> list[Cuttable]:
        """Who is in the middle of a frame of an earlier push of this writer."""
        return [
            connection
            for connection, other in self._busy.get(header.lease_id, {}).items()
            if other.writer_id == header.writer_id and other.push < header.push
        ]
