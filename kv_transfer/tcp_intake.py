"""Data plane between hosts, receiver's end: every field is checked against the lease first.

The payload is received straight into the lease's blocks. A connection is closed at the first
frame that is not as agreed.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import xxhash

from engine.kv_cache.layout import KvLayout
from kv_transfer import stream
from kv_transfer.blocks import host_blocks
from kv_transfer.config import TransferConfig
from kv_transfer.copying import Bytes, Offsets
from kv_transfer.data_listener import Connection, DataListener
from kv_transfer.frame import (
    CHECKSUM_BYTES,
    FrameHeader,
    PushStatus,
    is_checksum,
)
from kv_transfer.frame_reader import FrameReader, receive_all
from kv_transfer.gate import FRAME_BYTES, Gate
from kv_transfer.memory import KvMemory
from kv_transfer.offer import TcpOffer
from kv_transfer.payload import PIECE_BYTES, Payload, cut
from kv_transfer.plane import WriteWindow
from kv_transfer.runs import Region
from kv_transfer.tls import server_context
from kv_transfer.wire import LEAST_BYTES, PoolBlocks, wire_of


class TcpIntake:
    """Listens from construction on; `close` ends every thread."""

    def __init__(self, memory: KvMemory, *, epoch: int, config: TransferConfig) -> None:
        """Raises OSError when the address cannot be bound or a TLS file not be read."""
        self.memory = memory
        self.blocks = host_blocks(memory)
        self.gate = Gate(epoch, memory.layout)
        self.timeout_s = config.data_timeout_s
        self.tls = server_context(config)
        self._listener = DataListener(
            config.data_address,
            max_connections=config.max_data_connections,
            serve=self._serve,
        )
        self.offer = TcpOffer(
            self._listener.host, self._listener.port, is_secured=self.tls is not None
        )

    @property
    def dropped(self) -> Counter[str]:
        return self._listener.dropped

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
        self._listener.close()

    def _serve(self, connection: Connection) -> None:
        if self.tls is not None:
            # Known to the connection before its handshake, so that it can be cut in the middle.
            connection.socket = sock = stream.secured(connection.socket, self.tls, is_server=True)
            stream.shake_hands(sock, timeout_s=self.timeout_s)
        body = _SocketBody(self, connection)
        FrameReader(connection, self.gate, body, timeout_s=self.timeout_s).run()


class _SocketBody:
    """The payload follows on the connection."""

    def __init__(self, intake: TcpIntake, connection: Connection) -> None:
        self._intake = intake
        self._connection = connection
        self._wire = wire_of(connection.socket, timeout_s=intake.timeout_s)
        self._last_region: Region | None = None
        self._staging: Bytes | None = None

    def take(self, header: FrameHeader, block_ids: Offsets) -> PushStatus:
        blocks = self._intake.blocks
        if blocks is None:
            return self._receive_for_device(header, block_ids)
        region = self._region(blocks.layout, header)
        if self._wire is not None and header.num_bytes >= LEAST_BYTES:
            wanted = PoolBlocks(blocks.flat, region.block_runs, block_ids)
            is_sound = self._wire.receive(wanted, has_checksum=header.has_checksum)
            return PushStatus.WRITTEN if is_sound else PushStatus.CORRUPT
        runs = region.runs_of(block_ids, region.grain(FRAME_BYTES), FRAME_BYTES)
        payload = Payload(blocks.flat, *runs, self._scratch())
        status = self._receive_checked(header, payload.views())
        if status is PushStatus.WRITTEN:
            payload.scatter()
        return status

    def _region(self, layout: KvLayout, header: FrameHeader) -> Region:
        """The one of the frame before, mostly."""
        box, first_slot, num_slots = header.box, header.first_slot, header.num_slots
        last = self._last_region
        if last is None or (last.box, last.first_slot, last.num_slots) != (
            box,
            first_slot,
            num_slots,
        ):
            last = self._last_region = Region(layout, box, first_slot, num_slots)
        return last

    def skip(self, header: FrameHeader) -> None:
        self._receive_checked(header, [self._scratch()[: header.num_bytes].data])

    def _receive_for_device(self, header: FrameHeader, block_ids: Offsets) -> PushStatus:
        data = self._scratch()[: header.num_bytes].data
        status = self._receive_checked(header, [data])
        if status is not PushStatus.WRITTEN:
            return status
        box, first_slot = header.box, header.first_slot
        bytes_of_block = header.num_bytes // header.num_blocks
        for index, block_id in enumerate(block_ids.tolist()):
            self._intake.memory.write_slots(
                block_id,
                layers=slice(box.first_layer, box.first_layer + box.num_layers),
                heads=slice(box.first_head, box.first_head + box.num_heads),
                slots=slice(first_slot, first_slot + header.num_slots),
                data=data[index * bytes_of_block : (index + 1) * bytes_of_block],
            )
        return PushStatus.WRITTEN

    def _receive_checked(self, header: FrameHeader, views: Sequence[memoryview]) -> PushStatus:
        timeout_s = self._intake.timeout_s
        if not header.has_checksum:
            receive_all(self._connection, *views, timeout_s=timeout_s)
            return PushStatus.WRITTEN
        hashed = xxhash.xxh3_64()
        checksum = bytearray(CHECKSUM_BYTES)
        pieces = list(cut(views, PIECE_BYTES))
        for piece in pieces:
            behind = [memoryview(checksum)] if piece is pieces[-1] else []
            receive_all(self._connection, *piece, *behind, timeout_s=timeout_s)
            for view in piece:
                hashed.update(view)
        is_sound = is_checksum(checksum, hashed.intdigest())
        return PushStatus.WRITTEN if is_sound else PushStatus.CORRUPT

    def _scratch(self) -> Bytes:
        if self._staging is None:
            num_bytes = max(FRAME_BYTES, self._intake.memory.layout.block_bytes)
            self._staging = np.empty(num_bytes, np.uint8)
        return self._staging
