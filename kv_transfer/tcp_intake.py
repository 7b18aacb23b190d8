"""Data plane between hosts, receiver's end: every field is checked against the lease first.

The payload is received straight into the lease's blocks. A connection is closed at the first
frame that is not as agreed.
"""

from collections import Counter

import numpy as np

from kv_transfer import stream
from kv_transfer.blocks import host_blocks
from kv_transfer.config import TransferConfig
from kv_transfer.copying import Bytes, Offsets
from kv_transfer.data_listener import Connection, DataListener
from kv_transfer.frame import (
    BLOCK_ID,
    HEADER_BYTES,
    FrameError,
    FrameFlag,
    FrameHeader,
    PushAnswer,
    PushStatus,
    header_from,
    ids_from,
)
from kv_transfer.gate import FRAME_BYTES, Gate
from kv_transfer.memory import KvMemory
from kv_transfer.offer import TcpOffer
from kv_transfer.payload import Payload, digest
from kv_transfer.plane import WriteWindow
from kv_transfer.runs import Region
from kv_transfer.tls import server_context


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
            serve=lambda connection: _Receiving(self, connection).run(),
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


class _Receiving:
    """The frames of one connection, in its thread."""

    def __init__(self, intake: TcpIntake, connection: Connection) -> None:
        self._intake = intake
        self._connection = connection
        self._header = bytearray(HEADER_BYTES)
        self._staging: Bytes | None = None

    def run(self) -> None:
        intake, connection = self._intake, self._connection
        if intake.tls is not None:
            # Known to the connection before its handshake, so that it can be cut in the middle.
            connection.socket = sock = stream.secured(connection.socket, intake.tls, is_server=True)
            stream.shake_hands(sock, timeout_s=intake.timeout_s)
        status = PushStatus.WRITTEN
        # A stranger must show a valid frame soon; a sender may then be idle as long as it likes.
        timeout_s: float | None = intake.timeout_s
        while stream.receive(connection.socket, memoryview(self._header), timeout_s=timeout_s):
            header = header_from(self._header)
            try:
                status = max(status, self._receive_frame(header))
            except FrameError as error:
                is_lost = str(error) in ("unknown_lease", "stale_epoch")
                self._answer(header, PushStatus.LEASE_LOST if is_lost else PushStatus.REFUSED)
                raise
            timeout_s = intake.timeout_s
            if FrameFlag.LAST in header.flags:
                self._answer(header, status)
                status, timeout_s = PushStatus.WRITTEN, None

    def _answer(self, header: FrameHeader, status: PushStatus) -> None:
        answer = PushAnswer(status, header.push, header.lease_id)
        self._connection.socket.sendall(answer.to_bytes())

    def _receive_frame(self, header: FrameHeader) -> PushStatus:
        gate = self._intake.gate
        gate.check_shape(header)
        block_ids = self._receive_ids(header)
        if not gate.enter(header, block_ids, self._connection):
            self._receive([self._scratch()[: header.num_bytes].data])
            return PushStatus.LEASE_LOST
        try:
            return self._receive_slots(header, block_ids)
        finally:
            gate.leave(header, self._connection)

    def _receive_ids(self, header: FrameHeader) -> Offsets:
        data = bytearray(header.num_blocks * BLOCK_ID.itemsize)
        self._receive([memoryview(data)])
        return ids_from(header, data)

    def _receive_slots(self, header: FrameHeader, block_ids: Offsets) -> PushStatus:
        blocks = self._intake.blocks
        if blocks is None:
            return self._receive_for_device(header, block_ids)
        region = Region(blocks.layout, header.box, header.first_slot, header.num_slots)
        runs = region.runs_of(block_ids, region.grain(FRAME_BYTES), FRAME_BYTES)
        payload = Payload(blocks.flat, *runs, self._scratch())
        status = self._receive_checked(header, payload.views())
        if status is PushStatus.WRITTEN:
            payload.scatter()
        return status

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

    def _receive_checked(self, header: FrameHeader, views: list[memoryview]) -> PushStatus:
        self._receive(views)
        if FrameFlag.CHECKSUM in header.flags and digest(views) != header.checksum:
            return PushStatus.CORRUPT
        return PushStatus.WRITTEN

    def _receive(self, views: list[memoryview]) -> None:
        timeout_s = self._intake.timeout_s
        if not stream.receive(self._connection.socket, *views, timeout_s=timeout_s):
            raise ConnectionResetError("closed before the payload")

    def _scratch(self) -> Bytes:
        if self._staging is None:
            num_bytes = max(FRAME_BYTES, self._intake.memory.layout.block_bytes)
            self._staging = np.empty(num_bytes, np.uint8)
        return self._staging
