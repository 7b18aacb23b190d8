"""Prefill and decode workers as simulated processes: everything but threads and sockets is real."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

from decode_worker.stream import GatewayStream
from engine.runtime.commands import TokenEvent
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.lease import Lease
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.states import LeaseEvent
from prefill_worker.prefill import Prefiller
from tests.fakes.kv_memory import HostMemory
from tests.fakes.sim.engine import LAYOUT, SimEngine
from tests.fakes.sim.network import Network, Process, Server, SimChannel
from tests.fakes.sim.planes import (
    ReceivingEnd,
    SendingEnd,
    SimSendingRank,
    SimTcpIntake,
    blocks_of,
)

CONFIG = TransferConfig(
    data_plane=DataPlane.SHM, lease_s=1.0, reserve_timeout_s=4.0, rpc_timeout_s=0.5, max_hold_s=30.0
)
FREE_WITHIN_S = 2.0
"""After the end of its lease, an abandoned reservation is free."""


@dataclass(frozen=True, slots=True)
class SimPrefill:
    process: Process
    engine: SimEngine
    sender: KvSender
    prefiller: Prefiller


@dataclass(slots=True)
class SimDecode:
    process: Process
    engine: SimEngine
    receiver: KvReceiver
    stream: GatewayStream
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """Decoded so far, by request."""
    reader: asyncio.Task[None] | None = None

    async def abort(self, request_id: str) -> None:
        """As a gateway's message."""
        self.stream.abort(request_id)

    async def read(self) -> None:
        """As the gateway's end of the stream."""
        while True:
            for output in await self.stream.next_outputs():
                if isinstance(output, TokenEvent):
                    self.tokens.setdefault(output.request_id, []).append(output.token_id)


def _skewed(skew_s: float) -> Callable[[], float]:
    loop = asyncio.get_running_loop()
    return lambda: loop.time() + skew_s


@asynccontextmanager
async def prefill_worker(
    name: str, network: Network, ends: dict[str, ReceivingEnd], *, num_blocks: int, plane: str
) -> AsyncIterator[SimPrefill]:
    chance = network.chance
    process = Process(name, host=name)
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(HostMemory(num_blocks, LAYOUT))
        engine = await stack.enter_async_context(
            SimEngine(process, memory, network, num_blocks=num_blocks)
        )
        source = SendingEnd(process, memory, engine)
        rank = SimSendingRank(source, ends, network, plane)
        sender = await stack.enter_async_context(
            KvSender(
                SendingGroup(GroupLayout.single(LAYOUT), num_blocks, (rank,)),
                sender_id=name,
                model_digest="abc",
                open_channel=lambda address: SimChannel(network, process, address),  # type: ignore[arg-type,return-value]
                config=CONFIG,
                clock=_skewed(chance.uniform(-500, 500)),
            )
        )
        yield SimPrefill(
            process, engine, sender, Prefiller(engine, sender, hash_salt_of=lambda _: 0)
        )


@asynccontextmanager
async def decode_worker(
    name: str, network: Network, ends: dict[str, ReceivingEnd], *, num_blocks: int
) -> AsyncIterator[SimDecode]:
    chance = network.chance
    process = Process(name, host=name.partition("#")[0])
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(HostMemory(num_blocks, LAYOUT))
        engine = await stack.enter_async_context(
            SimEngine(process, memory, network, num_blocks=num_blocks)
        )
        epoch = chance.integer(1, 1 << 60)
        tcp = SimTcpIntake(memory, epoch=epoch)
        rank = LocalReceivingRank(memory, CONFIG, other_planes=(tcp,))
        receiver = await stack.enter_async_context(
            KvReceiver(
                engine,
                ReceivingGroup(GroupLayout.single(LAYOUT), num_blocks, (rank,)),
                receiver_id=process.host,
                model_digest="abc",
                config=CONFIG,
                epoch=epoch,
                clock=_skewed(chance.uniform(-500, 500)),
            )
        )
        receiver._table._new_id = lambda: chance.integer(1, 1 << 61)
        assert rank.shm is not None
        end = ReceivingEnd(
            process, memory, blocks_of(memory), engine, receiver, network.watch, tcp, set()
        )
        ends[rank.shm.offer.path] = end
        _watch_freed(end)
        network.servers[process.host] = Server(process, receiver)
        worker = SimDecode(process, engine, receiver, GatewayStream(engine, receiver))
        worker.reader = process.spawn(worker.read())
        yield worker


def _watch_freed(end: ReceivingEnd) -> None:
    """An expired lease's blocks must be back soon, unless a writer is stuck in a slice."""
    table = end.receiver._table
    freed = table.freed

    def watched(lease: Lease) -> None:
        freed(lease)
        late_s = table._clock() - lease.expires_s
        is_late = lease.end_reason is LeaseEvent.EXPIRED and late_s > FREE_WITHIN_S
        if is_late and lease.lease_id not in end.stuck_leases:
            end.watch.violate(f"{lease.request_id} was free {late_s:.1f} s after its lease")

    table.freed = watched  # type: ignore[method-assign]
