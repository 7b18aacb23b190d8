"""Data plane over NIXL, receiver's end: it fetches the blocks from the sender's memory itself.

A sender that wrote into the receiver's pool over a network card could not be fenced: a write
that is under way cannot be called back. So the receiver reads. It knows its own reads, and lets
no block go while one is under way. Frames come over a TCP connection, with addresses instead of a
payload.
"""

from engine.errors import PeerUnavailableError
from kv_transfer.blocks import host_blocks
from kv_transfer.config import TransferConfig
from kv_transfer.copying import Offsets
from kv_transfer.data_listener import Connection, DataListener
from kv_transfer.frame import (
    CHECKSUM_BYTES,
    FrameError,
    FrameHeader,
    PushStatus,
    is_checksum,
)
from kv_transfer.frame_reader import FrameReader, receive_all
from kv_transfer.gate import Gate
from kv_transfer.memory import KvMemory
from kv_transfer.nixl_agent import Addresses, NixlAgent
from kv_transfer.nixl_wire import receive_addresses, receive_greeting
from kv_transfer.offer import NixlOffer
from kv_transfer.payload import digest
from kv_transfer.plane import WriteWindow
from kv_transfer.runs import Grain, Region

FETCH_BYTES = 64 << 20
"""Most content of a frame: one transfer."""
WHOLE_RUN = 1 << 62
"""Runs are as long as they can be."""


class NixlIntake:
    """Listens from construction on; `close` ends every thread."""

    def __init__(
        self, memory: KvMemory, *, epoch: int, config: TransferConfig, address: str
    ) -> None:
        """Raises OSError when the address cannot be bound, PeerUnavailableError without NIXL."""
        blocks = host_blocks(memory)
        if blocks is None:
            raise PeerUnavailableError("data_plane is nixl but the KV pool is not host memory")
        self.blocks = blocks
        self.agent = NixlAgent(blocks.flat)
        self.timeout_s = config.data_timeout_s
        self._gate = Gate(epoch, memory.layout, frame_bytes=FETCH_BYTES)
        self._listener = DataListener(
            address, max_connections=config.max_data_connections, serve=self._serve
        )
        self.offer = NixlOffer(self._listener.host, self._listener.port)

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self._listener.dropped)

    def open(self, window: WriteWindow) -> None:
        self._gate.open(window)

    def fence(self, lease_id: int, *, is_forced: bool) -> bool:
        writers = self._gate.fence(lease_id)
        if is_forced:
            for connection in writers:
                connection.shutdown()
        return not writers

    def forget(self, lease_id: int) -> None:
        self._gate.forget(lease_id)

    def close(self) -> None:
        self.agent.stop()
        self._listener.close()
        self.agent.close()

    def _serve(self, connection: Connection) -> None:
        try:
            name = self.agent.know(receive_greeting(connection, timeout_s=self.timeout_s))
        except PeerUnavailableError as error:
            raise FrameError("bad_metadata") from error
        try:
            body = _FetchedBody(self, connection, name)
            FrameReader(connection, self._gate, body, timeout_s=self.timeout_s).run()
        except PeerUnavailableError as error:
            raise ConnectionAbortedError(str(error)) from error
        finally:
            self.agent.forget(name)


class _FetchedBody:
    """Addresses follow on the connection, of what is to be read from the sender's memory."""

    def __init__(self, intake: NixlIntake, connection: Connection, name: str) -> None:
        self._intake = intake
        self._connection = connection
        self._name = name

    def take(self, header: FrameHeader, block_ids: Offsets) -> PushStatus:
        blocks = self._intake.blocks
        addresses, checksum = self._receive_addresses(header)
        region = Region(blocks.layout, header.box, header.first_slot, header.num_slots)
        grain = _grain_of(region, len(addresses) // header.num_blocks)
        offsets, lengths = region.runs_of(block_ids, grain, WHOLE_RUN)
        if len(offsets) != len(addresses):
            raise FrameError("bad_addresses")
        self._intake.agent.read(self._name, addresses, offsets, lengths)
        if header.has_checksum:
            pool = blocks.flat.data
            runs = zip(offsets.tolist(), lengths.tolist(), strict=True)
            views = [pool[offset : offset + length] for offset, length in runs]
            if not is_checksum(checksum, digest(views)):
                return PushStatus.CORRUPT
        return PushStatus.WRITTEN

    def skip(self, header: FrameHeader) -> None:
        self._receive_addresses(header)

    def _receive_addresses(self, header: FrameHeader) -> tuple[Addresses, bytearray]:
        """And the payload's checksum, if there is one."""
        timeout_s = self._intake.timeout_s
        most = header.num_blocks * header.box.num_cells * self._intake.blocks.layout.num_parts
        bounds = range(header.num_blocks, most + 1)
        addresses = receive_addresses(self._connection, bounds, timeout_s=timeout_s)
        checksum = bytearray()
        if header.has_checksum:
            checksum = bytearray(CHECKSUM_BYTES)
            receive_all(self._connection, memoryview(checksum), timeout_s=timeout_s)
        return addresses, checksum


def _grain_of(region: Region, runs_of_block: int) -> Grain:
    """The sender's: the one with so many runs; where two have as many they are the same."""
    for grain in range(region.grain(WHOLE_RUN), -1, -1):
        if len(region.runs(Grain(grain), WHOLE_RUN)[0]) == runs_of_block:
            return Grain(grain)
    raise FrameError("bad_addresses")
