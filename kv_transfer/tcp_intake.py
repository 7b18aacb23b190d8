"""Data plane between hosts, receiver's end: a listener and one thread for each connection.

Every field of a frame is checked against the lease before its payload is received, straight
into the lease's block. A connection is closed at the first frame that is not as agreed.
"""

import contextlib
import logging
import socket
import threading
import time
from collections import Counter

import numpy as np
import xxhash

from engine.kv_cache.layout import KvLayout
from engine.parallel.layout import MAX_RANKS
from kv_transfer import stream
from kv_transfer.blocks import Bytes, host_blocks
from kv_transfer.config import TransferConfig, address_from
from kv_transfer.frame import (
    HEADER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushAnswer,
    PushStatus,
    header_from,
)
from kv_transfer.memory import KvMemory
from kv_transfer.offer import TcpOffer
from kv_transfer.plane import WriteWindow

logger = logging.getLogger(__name__)


class _OpenLease:
    """What may be written under a lease, and by which push of each writer."""

    def __init__(self, window: WriteWindow) -> None:
        self.window = window
        self.index_of = {block_id: index for index, block_id in enumerate(window.block_ids)}
        self.newest_push: dict[int, int] = {}


class _Gate:
    """Which leases are open and who is writing under them; the loop and the threads share it."""

    def __init__(self, epoch: int, layout: KvLayout) -> None:
        self._epoch = epoch
        self._layout = layout
        self._lock = threading.Lock()
        self._has_left = threading.Condition(self._lock)
        self._open: dict[int, _OpenLease] = {}
        self._fenced: set[int] = set()
        self._busy: dict[int, dict[_Connection, FrameHeader]] = {}

    def open(self, window: WriteWindow) -> None:
        opened = _OpenLease(window)
        with self._lock:
            if window.lease_id not in self._fenced:  # an abort may come before the news of a grant
                self._open[window.lease_id] = opened

    def fence(self, lease_id: int) -> list["_Connection"]:
        """Shut the lease; returns who is in the middle of a frame of it."""
        with self._lock:
            self._open.pop(lease_id, None)
            self._fenced.add(lease_id)
            return list(self._busy.get(lease_id, ()))

    def forget(self, lease_id: int) -> None:
        with self._lock:
            self._fenced.discard(lease_id)

    def enter(self, header: FrameHeader, connection: "_Connection") -> bool:
        """Let a frame in; False when its payload must go nowhere.

        That is so when its lease was shut, and when its writer has begun a later push: damaged or
        late bytes of a push that was given up must not fall on those of its repetition. Waits for
        the last frame of the earlier push that is under way, whose connection is cut.
        """
        self._check_shape(header)
        with self._lock:
            while True:
                if header.lease_id in self._fenced:
                    return False
                opened = self._open.get(header.lease_id)
                if opened is None:
                    raise FrameError("unknown_lease")
                self._check_place(header, opened)
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

    def leave(self, header: FrameHeader, connection: "_Connection") -> None:
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

    def _earlier(self, header: FrameHeader) -> list["_Connection"]:
        """Who is in the middle of a frame of an earlier push of this writer."""
        return [
            connection
            for connection, other in self._busy.get(header.lease_id, {}).items()
            if other.writer_id == header.writer_id and other.push < header.push
        ]

    def _check_place(self, header: FrameHeader, opened: _OpenLease) -> None:
        index = opened.index_of.get(header.block_id)
        if index is None:
            raise FrameError("foreign_block")
        first_token = index * self._layout.block_size_tokens + header.first_slot
        is_inside = (
            header.first_slot + header.num_slots <= self._layout.block_size_tokens
            and opened.window.first_token <= first_token
            and first_token + header.num_slots <= opened.window.end_token
        )
        if not is_inside:
            raise FrameError("foreign_slots")

    def _check_shape(self, header: FrameHeader) -> None:
        layout, box = self._layout, header.box
        if header.epoch != self._epoch:
            raise FrameError("stale_epoch")
        if not 1 <= header.num_slots <= layout.block_size_tokens:
            raise FrameError("bad_slots")
        if not box.is_inside(layout):
            raise FrameError("bad_box")
        if header.num_bytes != header.num_slots * box.num_cells * layout.bytes_per_cell:
            raise FrameError("bad_length")


class TcpIntake:
    """Listens from construction on; `close` ends every thread."""

    def __init__(self, memory: KvMemory, *, epoch: int, config: TransferConfig) -> None:
        """Raises OSError when the address cannot be bound."""
        self.memory = memory
        self.blocks = host_blocks(memory)
        self.gate = _Gate(epoch, memory.layout)
        self.timeout_s = config.data_timeout_s
        self.dropped: Counter[str] = Counter()
        """Connections that were closed from this side, by reason."""
        self._max_connections = config.max_data_connections
        self._connections: set[_Connection] = set()
        self._lock = threading.Lock()
        self._is_closed = False
        host, port = address_from(config.data_address)
        self._listener = _listener(host, port)
        self.offer = TcpOffer(host, self._listener.getsockname()[1])
        self._thread = threading.Thread(target=self._accept, name="kv-accept", daemon=True)
        self._thread.start()

    def open(self, window: WriteWindow) -> None:
        self.gate.open(window)

    def fence(self, lease_id: int, *, is_forced: bool) -> bool:
        writers = self.gate.fence(lease_id)
        if is_forced:
            for connection in writers:
                connection.shutdown()
        return not writers

    def forget(self, lease_id: int) -> None:
        self.gate.forget(lease_id)

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        for connection in connections:
            connection.shutdown()
        for connection in connections:
            connection.thread.join()

    def drop(self, reason: str, peer: str) -> None:
        """Count why a connection is closed from this side."""
        with self._lock:
            self.dropped[reason] += 1
        logger.warning("closed data connection peer=%s reason=%s", peer, reason)

    def remove(self, connection: "_Connection") -> None:
        with self._lock:
            self._connections.discard(connection)

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._listener.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(stream.TICK_S)  # out of descriptors: the connections may end
                continue
            with self._lock:
                has_room = not self._is_closed and len(self._connections) < self._max_connections
                if has_room:
                    connection = _Connection(self, sock, f"{peer[0]}:{peer[1]}")
                    self._connections.add(connection)
                    connection.thread.start()
            if not has_room:
                sock.close()
                self.drop("too_many", f"{peer[0]}:{peer[1]}")


class _Connection:
    """Receives the frames of one sender, in its own thread."""

    def __init__(self, intake: TcpIntake, sock: socket.socket, peer: str) -> None:
        self._intake = intake
        self._socket = sock
        self._peer = peer
        self._header = bytearray(HEADER_BYTES)
        self._staging: Bytes | None = None
        self.thread = threading.Thread(target=self._run, name="kv-receive", daemon=True)

    def shutdown(self) -> None:
        """Make the thread end; from any thread."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _run(self) -> None:
        try:
            stream.prepare(self._socket)
            self._receive_pushes()
        except FrameError as error:
            self._intake.drop(str(error), self._peer)
        except stream.StalledError:
            self._intake.drop("stalled", self._peer)
        except OSError:
            self._intake.drop("broken", self._peer)
        finally:
            self._socket.close()
            self._intake.remove(self)

    def _receive_pushes(self) -> None:
        status = PushStatus.WRITTEN
        # A stranger must show a valid frame soon; a sender may then be idle as long as it likes.
        timeout_s: float | None = self._intake.timeout_s
        while stream.receive(self._socket, memoryview(self._header), timeout_s=timeout_s):
            header = header_from(self._header)
            try:
                status = max(status, self._receive_frame(header))
            except FrameError as error:
                is_lost = str(error) in ("unknown_lease", "stale_epoch")
                self._answer(header, PushStatus.LEASE_LOST if is_lost else PushStatus.REFUSED)
                raise
            timeout_s = self._intake.timeout_s
            if FrameFlag.LAST in header.flags:
                self._answer(header, status)
                status, timeout_s = PushStatus.WRITTEN, None

    def _answer(self, header: FrameHeader, status: PushStatus) -> None:
        answer = PushAnswer(status, header.push, header.lease_id)
        self._socket.sendall(answer.to_bytes())

    def _receive_frame(self, header: FrameHeader) -> PushStatus:
        if not self._intake.gate.enter(header, self):
            self._receive_payload(self._scratch(header.num_bytes))
            return PushStatus.LEASE_LOST
        try:
            return self._receive_slots(header)
        finally:
            self._intake.gate.leave(header, self)

    def _receive_slots(self, header: FrameHeader) -> PushStatus:
        blocks = self._intake.blocks
        view = None
        if blocks is not None:
            view = blocks.slots(header.block_id, header.box, header.first_slot, header.num_slots)
        if view is not None and view.flags.c_contiguous:
            return self._receive_checked(header, view.reshape(-1))
        data = self._scratch(header.num_bytes)
        status = self._receive_checked(header, data)
        if status is not PushStatus.WRITTEN:
            return status
        if view is None:
            self._write_device(header, data)
        else:
            # One strided copy: cheaper than receiving into each of the box's many short runs.
            np.copyto(view, data.reshape(view.shape))
        return PushStatus.WRITTEN

    def _receive_checked(self, header: FrameHeader, target: Bytes) -> PushStatus:
        self._receive_payload(target)
        has_checksum = FrameFlag.CHECKSUM in header.flags
        if has_checksum and xxhash.xxh3_64_intdigest(target.data) != header.checksum:
            return PushStatus.CORRUPT
        return PushStatus.WRITTEN

    def _write_device(self, header: FrameHeader, data: Bytes) -> None:
        box, first_slot = header.box, header.first_slot
        self._intake.memory.write_slots(
            header.block_id,
            layers=slice(box.first_layer, box.first_layer + box.num_layers),
            heads=slice(box.first_head, box.first_head + box.num_heads),
            slots=slice(first_slot, first_slot + header.num_slots),
            data=data.data,
        )

    def _receive_payload(self, target: Bytes) -> None:
        is_open = stream.receive(self._socket, target.data, timeout_s=self._intake.timeout_s)
        if not is_open:
            raise ConnectionResetError("closed before the payload")

    def _scratch(self, num_bytes: int) -> Bytes:
        if self._staging is None:
            self._staging = np.empty(self._intake.memory.layout.block_bytes, np.uint8)
        return self._staging[:num_bytes]


def _listener(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError:
        listener.close()
        raise
    return listener
