"""A KvSender and a KvReceiver joined by a real gRPC server, for tests of the handover."""

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from grpc import aio

from engine.kv_cache.layout import KvLayout
from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.report import HandoverReport
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from mesh.channel import open_channel
from mesh.server import listening
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc
from tests.fakes.engine import FakeEngine
from tests.fakes.kv_memory import TINY_LAYOUT, HostMemory
from tests.fakes.kv_planes import FAST, ends_of, memory_types

__all__ = ["FAST", "KvPair", "kv_pair", "serving"]


@dataclass(slots=True)
class KvPair:
    sender: KvSender
    receiver: KvReceiver
    engine: FakeEngine
    local: HostMemory
    remote: HostMemory
    address: str
    reports: list[HandoverReport] = field(default_factory=list)


@asynccontextmanager
async def serving(receiver: KvReceiver, *, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The receiver behind a gRPC server; yields host:port."""

    def add(server: aio.Server) -> None:
        pb_grpc.add_KvTransferServiceServicer_to_server(KvTransferServicer(receiver), server)

    async with listening(add, address=address, drain_grace_s=0) as port:
        yield f"127.0.0.1:{port}"


@asynccontextmanager
async def kv_pair(
    plane: str = "shm",
    *,
    num_blocks: int = 16,
    config: TransferConfig = FAST,
    clock: Callable[[], float] | None = None,
    engine: FakeEngine | None = None,
    sender_digest: str = "abc",
    sender_layout: KvLayout = TINY_LAYOUT,
) -> AsyncIterator[KvPair]:
    """Both ends in one process, joined by the data plane of that name."""
    clocks: dict[str, Any] = {} if clock is None else {"clock": clock}
    local_type, remote_type = memory_types(plane)
    engine = engine or FakeEngine(num_blocks=num_blocks, block_size_tokens=4)
    reports: list[HandoverReport] = []
    async with AsyncExitStack() as stack:
        local = stack.enter_context(local_type(layout=sender_layout).fill_randomly(seed=1))
        remote = stack.enter_context(remote_type(num_blocks).fill_randomly(seed=2))
        ends = ends_of(plane, local, remote, config)
        source, target, config = ends.source, ends.target, ends.config
        receiver = await stack.enter_async_context(
            KvReceiver(
                engine,
                ReceivingGroup(GroupLayout.single(remote.layout), num_blocks, (target,)),
                receiver_id="decode-0",
                model_digest="abc",
                config=config,
                **clocks,
            )
        )
        address = await stack.enter_async_context(serving(receiver))
        sender = await stack.enter_async_context(
            KvSender(
                SendingGroup(GroupLayout.single(sender_layout), local.num_blocks, (source,)),
                sender_id="prefill-0",
                model_digest=sender_digest,
                open_channel=open_channel,
                config=config,
                on_end=reports.append,
                **clocks,
            )
        )
        yield KvPair(sender, receiver, engine, local, remote, address, reports)
