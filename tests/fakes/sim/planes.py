"""Data planes between simulated processes. The fences are the real ones, the writers are not.

A writer's thread is a coroutine here, which may be held up or die at any byte. Each plane keeps
the writer's side of the bargain as `kv_transfer/shm.py` and `kv_transfer/tcp_writer.py` do.
"""

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from engine.errors import KvCorruptionError, KvLeaseLostError, PeerUnavailableError
from kv_transfer import range_lock
from kv_transfer.blocks import HostBlocks, host_blocks
from kv_transfer.computed import layers_computed
from kv_transfer.copying import Bytes
from kv_transfer.frame import FrameError, FrameHeader, PushStatus
from kv_transfer.gate import Gate
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.receiver import KvReceiver
from kv_transfer.reshard import Box, Transfer, of_layers
from kv_transfer.sending_rank import RankLink, Target, Written
from kv_transfer.slot_ranges import SlotRange
from kv_transfer.states import LeaseState
from tests.fakes.kv_memory import HostMemory
from tests.fakes.sim.chance import Chance, Fault
from tests.fakes.sim.engine import LAYOUT, NUM_LAYERS, SimEngine
from tests.fakes.sim.network import Network, Process
from tests.fakes.sim.watch import Watch

DATA_TIMEOUT_S = 0.5
TICK_S = 0.2


@dataclass(eq=False, slots=True)
class ReceivingEnd:
    """A decode process as its writers find it."""

    process: Process
    memory: HostMemory
    blocks: HostBlocks
    engine: SimEngine
    receiver: KvReceiver
    watch: Watch
    tcp: "SimTcpIntake"
    stuck_leases: set[int]
    """Under which a writer was held up in the middle of a slice."""

    def land(self, lease_id: int, block_id: int, view: Bytes, data: Bytes, some: slice) -> None:
        """Some bytes of each token fall on a block, which must be lent and not be read yet."""
        if self.process.is_alive:  # else it is memory that only its writers still map
            lease = self.receiver._table.get(lease_id)
            request_id = None if lease is None else lease.request_id
            reservation = self.engine.scheduler.reservations.get(request_id or "")
            is_lent = (
                lease is not None
                and lease.state not in (LeaseState.COMMITTED, LeaseState.FREED)
                and reservation is not None
                and block_id in reservation.block_ids
                and reservation.first_token_id is None
            )
            if not is_lent:
                self.watch.violate(
                    f"a write under lease {lease_id} of {request_id} falls on block {block_id},"
                    " which is not lent under it"
                )
        np.copyto(view[..., some], data[..., some])


@dataclass(eq=False, slots=True)
class SendingEnd:
    """A prefill process as its links find it."""

    process: Process
    memory: HostMemory
    engine: SimEngine

    def read(self, watch: Watch, part: SlotRange, box: Box) -> Bytes:
        """The bytes of some tokens: their block must be held."""
        if not self.engine.scheduler.block_pool._ref_counts[part.local_block_id]:
            watch.violate(f"{self.process.name} reads block {part.local_block_id}, which is free")
        view = blocks_of(self.memory).slots(
            part.local_block_id, box, part.local_slot, part.num_slots
        )
        data: Bytes = view.copy()
        return data


class SimLink:
    """One link, one push at a time; what both planes have in common."""

    fallback_reasons: Sequence[str] = ()

    def __init__(
        self, source: SendingEnd, target: Target, end: ReceivingEnd, network: Network
    ) -> None:
        self._source = source
        self._transfer = target.transfers[0]
        self._end = end
        self._network = network
        self._chance: Chance = network.chance
        self._turn = asyncio.Lock()

    def write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None = None
    ) -> asyncio.Future[Written]:
        return self._source.process.spawn(self._write(permit, parts, step))

    async def _write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None
    ) -> Written:
        if step is None:
            await self._write_layers(permit, parts, range(NUM_LAYERS))
        else:
            for layer in range(NUM_LAYERS):
                await layers_computed(self._source.memory.progress, step, layer, permit)
                await self._write_layers(permit, parts, range(layer, layer + 1))
        num_slots = sum(part.num_slots for part in parts)
        return Written(num_slots * NUM_LAYERS * LAYOUT.bytes_per_cell, 0)

    async def _write_layers(
        self, permit: WritePermit, parts: Sequence[SlotRange], layers: range
    ) -> None:
        (transfer,) = of_layers([self._transfer], layers)
        async with self._turn:
            permit.check()
            await self._push(permit, parts, transfer)

    async def _push(
        self, permit: WritePermit, parts: Sequence[SlotRange], transfer: Transfer
    ) -> None:
        raise NotImplementedError

    async def _pause(self) -> bool:
        """The thread waits for its turn; True when that takes unusually long."""
        chance = self._chance
        pause_s = chance.uniform(0.0, 0.004)
        is_stopped = chance.hits(Fault.STOP, 0.02)
        if is_stopped:
            pause_s = chance.uniform(0.1, 4.0) if chance.uniform(0, 1) < 0.9 else 80.0
        await asyncio.sleep(pause_s)
        return is_stopped


class SimShmLink(SimLink):
    """Copies into the receiver's memory, under the real locks."""

    data_planes: Sequence[str] = ("shm",)

    def __init__(
        self, source: SendingEnd, target: Target, end: ReceivingEnd, network: Network
    ) -> None:
        super().__init__(source, target, end, network)
        self._fd = os.open(f"/proc/self/fd/{end.memory.shared_fd}", os.O_RDWR | os.O_CLOEXEC)

    async def _push(
        self, permit: WritePermit, parts: Sequence[SlotRange], transfer: Transfer
    ) -> None:
        for part in parts:
            await self._pause()
            with range_lock.writing(self._fd, permit.lease_id) as is_open:
                if not is_open:
                    raise KvLeaseLostError("fenced")
                permit.check()
                view = self._end.blocks.slots(
                    part.remote_block_id, transfer.target, part.remote_slot, part.num_slots
                )
                data = self._source.read(self._end.watch, part, transfer.source)
                self._end.land(permit.lease_id, part.remote_block_id, view, data, slice(0, 2))
                if await self._pause():
                    self._end.stuck_leases.add(permit.lease_id)
                data = self._source.read(self._end.watch, part, transfer.source)
                self._end.land(permit.lease_id, part.remote_block_id, view, data, slice(2, None))

    def close(self) -> None:
        os.close(self._fd)


class SimTcpLink(SimLink):
    """Frames over a connection, as `tcp_writer`'s are."""

    data_planes: Sequence[str] = ("tcp",)

    def __init__(
        self, source: SendingEnd, target: Target, end: ReceivingEnd, network: Network
    ) -> None:
        super().__init__(source, target, end, network)
        self._connection: SimConnection | None = None
        self._writer_id = id(self)
        self._num_pushes = 0

    async def _push(
        self, permit: WritePermit, parts: Sequence[SlotRange], transfer: Transfer
    ) -> None:
        status = None
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._num_pushes += 1
            connection = self._connection
            for part in parts:
                await self._pause()
                permit.check()
                await self._pause()
                connection.send(self._frame(permit, part, transfer, is_last=part == parts[-1]))
            status = await self._answer(connection, permit)
        except OSError as error:
            raise PeerUnavailableError(f"data connection: {error}") from error
        finally:
            if status is not PushStatus.WRITTEN:
                self.close()
        if status is PushStatus.CORRUPT:
            raise KvCorruptionError("checksum")
        if status is not PushStatus.WRITTEN:
            raise KvLeaseLostError("fenced")

    def _connect(self) -> "SimConnection":
        end = self._end
        if not end.process.is_alive or not self._network.passes(
            self._source.process.host, end.process.host
        ):
            raise ConnectionRefusedError("nobody is there")
        return SimConnection(end, self._network)

    def _frame(
        self, permit: WritePermit, part: SlotRange, transfer: Transfer, *, is_last: bool
    ) -> "Frame":
        data = self._source.read(self._end.watch, part, transfer.source)
        header = FrameHeader(
            is_last=is_last,
            has_checksum=True,
            writer_id=self._writer_id,
            push=self._num_pushes,
            lease_id=permit.lease_id,
            epoch=permit.epoch,
            num_blocks=1,
            first_slot=part.remote_slot,
            num_slots=part.num_slots,
            box=transfer.target,
            num_bytes=data.nbytes,
            ids_checksum=0,
        )
        return Frame(header, part.remote_block_id, data, xxhash.xxh3_64_intdigest(data.tobytes()))

    async def _answer(self, connection: "SimConnection", permit: WritePermit) -> PushStatus:
        """Look at the permit now and then; a peer that is silent for long is given up."""
        waited_s = 0.0
        while waited_s < DATA_TIMEOUT_S:
            try:
                async with asyncio.timeout(TICK_S):
                    return await connection.answers.get()
            except TimeoutError:
                pass
            if connection.is_broken.done():
                raise ConnectionResetError("broken")
            permit.check()
            waited_s += TICK_S
        raise TimeoutError("stalled")

    def close(self) -> None:
        """What was sent before still arrives."""
        if self._connection is not None:
            self._connection.end()
            self._connection = None


@dataclass(frozen=True, slots=True)
class Frame:
    """Of one block."""

    header: FrameHeader
    block_id: int
    data: Bytes
    checksum: int


class SimConnection:
    """Frames on their way, and the thread that receives them one after the other."""

    def __init__(self, end: ReceivingEnd, network: Network) -> None:
        self.answers: asyncio.Queue[PushStatus] = asyncio.Queue()
        self.is_broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._end = end
        self._chance = network.chance
        self._has_stalled = False
        self._frames: asyncio.Queue[Frame | None] = asyncio.Queue()
        end.process.spawn(self._receive())

    def send(self, frame: Frame) -> None:
        if self.is_broken.done():
            raise BrokenPipeError("broken")
        self._frames.put_nowait(frame)

    def end(self) -> None:
        self._frames.put_nowait(None)

    def shutdown(self) -> None:
        """From the receiving side: nothing more is received."""
        if not self.is_broken.done():
            self.is_broken.set_result(None)

    async def _receive(self) -> None:
        status = PushStatus.WRITTEN
        try:
            while (frame := await self._frames.get()) is not None:
                await self._transit()
                status = max(status, await self._receive_frame(frame))
                if frame.header.is_last:
                    self.answers.put_nowait(status)
                    status = PushStatus.WRITTEN
        except FrameError:
            self.answers.put_nowait(PushStatus.LEASE_LOST)
        except ConnectionResetError:
            pass
        self.shutdown()

    async def _receive_frame(self, frame: Frame) -> PushStatus:
        header, block_id, data = frame.header, frame.block_id, frame.data
        if not await self._enter(frame):
            await self._transit()
            return PushStatus.LEASE_LOST
        try:
            view = self._end.blocks.slots(block_id, header.box, header.first_slot, header.num_slots)
            if self._chance.hits(Fault.CORRUPT, 0.6 if self._has_stalled else 0.02):
                data = data.copy()
                place = self._chance.integer(0, data.size - 1)
                data.reshape(-1)[place] ^= 1 << self._chance.integer(0, 7)
            cut = self._chance.integer(0, data.shape[-1])
            self._end.land(header.lease_id, block_id, view, data, slice(0, cut))
            await self._transit()
            self._end.land(header.lease_id, block_id, view, data, slice(cut, None))
            is_sound = xxhash.xxh3_64_intdigest(view.tobytes()) == frame.checksum
            return PushStatus.WRITTEN if is_sound else PushStatus.CORRUPT
        finally:
            self._end.tcp.gate.leave(header, self)

    async def _enter(self, frame: Frame) -> bool:
        gate, block_ids = self._end.tcp.gate, [frame.block_id]
        gate.check_shape(frame.header)
        while True:
            try:
                return gate.enter(frame.header, block_ids, self)
            except _WouldWaitError:
                await asyncio.sleep(0.001)

    async def _transit(self) -> None:
        """Bytes take their time; raises when the connection breaks before they are there."""
        delay_s = self._chance.uniform(0.0, 0.002)
        if self._chance.hits(Fault.STALL, 0.03):
            # Often just so long that the sender has given up and tried again.
            is_long = self._chance.uniform(0, 1) < 0.3
            delay_s = self._chance.uniform(0.1, 3.0) if is_long else DATA_TIMEOUT_S + TICK_S
            delay_s += self._chance.uniform(-0.1, 0.05)
            self._has_stalled = True
        if self._chance.hits(Fault.CUT, 0.03):
            self.shutdown()
        await asyncio.wait([self.is_broken], timeout=delay_s)
        if self.is_broken.done():
            raise ConnectionResetError("broken")


class _WouldWaitError(Exception):
    """The gate would let its thread wait."""


class _NoWait:
    """Stands for the gate's condition: there is only one thread here."""

    def wait(self) -> None:
        raise _WouldWaitError

    def notify_all(self) -> None:
        """Nobody waits: those who would, ask again."""


class SimTcpIntake:
    """As TcpIntake, around the real gate."""

    def __init__(self, memory: HostMemory, *, epoch: int) -> None:
        self.gate = Gate(epoch, memory.layout)
        self.gate._has_left = _NoWait()  # type: ignore[assignment]

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
        """The process is gone, and its connections with it."""


class SimSendingRank:
    """Opens links of one plane to whoever offers the memory behind a path."""

    def __init__(
        self, source: SendingEnd, ends: dict[str, ReceivingEnd], network: Network, plane: str
    ) -> None:
        self._source = source
        self._ends = ends
        self._network = network
        self._plane = plane

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        (target,) = targets
        assert target.offer.shm is not None
        end = self._ends[target.offer.shm.path]
        if not end.process.is_alive:
            raise PeerUnavailableError("its memory is gone")
        kind = SimShmLink if self._plane == "shm" else SimTcpLink
        return kind(self._source, target, end, self._network)


def blocks_of(memory: HostMemory) -> HostBlocks:
    blocks = host_blocks(memory)
    assert blocks is not None
    return blocks
