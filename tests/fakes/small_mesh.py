"""A prefill worker, a decode worker and a gateway in one process: real engines, real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from grpc import aio

from decode_worker.servicer import DecodeServicer
from engine.config import EngineConfig
from engine.runtime.build import build_engine
from engine.runtime.engine_thread import EngineThread
from kv_transfer.config import TransferConfig
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from mesh.channel import open_channel
from mesh.server import listening
from prefill_worker.prefill import Prefiller
from prefill_worker.servicer import PrefillServicer
from protos.isthmus.v1 import (
    decode_pb2_grpc,
    kv_transfer_pb2_grpc,
    prefill_pb2_grpc,
    registry_pb2,
)
from tests.fakes.gateway import MODEL_ID, RunningGateway, gateway_over_started

VOCAB_SIZE = 257  # of the gateway's byte tokeniser
POOL_BYTES = 1 << 23
ENGINE = EngineConfig(
    dtype="float32", device="cpu", kv_pool_bytes=POOL_BYTES, max_num_sequences=16, num_threads=1
)


@dataclass(frozen=True, slots=True)
class SmallWorker:
    """A worker as the gateway's directory lists it."""

    worker_id: str
    role: registry_pb2.WorkerRole
    address: str

    def record(self) -> registry_pb2.WorkerRecord:
        return registry_pb2.WorkerRecord(
            worker_id=self.worker_id,
            role=self.role,
            epoch=1,
            address=self.address,
            model_id=MODEL_ID,
            max_context_tokens=512,
        )


@dataclass(frozen=True, slots=True)
class SmallMesh:
    gateway: RunningGateway
    prefill: EngineThread
    decode: EngineThread
    sender: KvSender
    receiver: KvReceiver

    def held(self) -> dict[str, int]:
        """What the gauges of both workers show that is not zero."""
        counters = self.receiver.counters
        gauges = {
            "leases": counters.num_live_leases,
            "quarantined leases": counters.num_quarantined_leases,
            "waiting reservations": counters.num_waiting_reserves,
            "handovers": self.sender.counters.num_open_handovers,
        }
        for name, engine in (("prefill", self.prefill), ("decode", self.decode)):
            stats = engine.stats
            gauges[f"{name} blocks"] = stats.num_blocks - stats.num_free_blocks
            gauges[f"{name} waiting"] = stats.num_waiting
            gauges[f"{name} running"] = stats.num_running
        return {name: count for name, count in gauges.items() if count}


@asynccontextmanager
async def small_mesh(
    checkpoint: Path,
    transfer: TransferConfig,
    *,
    data_port: Callable[[int], Awaitable[int]] | None = None,
    decode_pool_bytes: int = POOL_BYTES,
) -> AsyncIterator[SmallMesh]:
    """Start all three.

    Args:
        checkpoint: of VOCAB_SIZE tokens.
        transfer: of both workers.
        data_port: where the sender finds the data port that it is given; for relays.
        decode_pool_bytes: of the decode worker's KV pool.
    """
    pools = (POOL_BYTES, decode_pool_bytes)
    engines = [build_engine(checkpoint, replace(ENGINE, kv_pool_bytes=size)) for size in pools]
    async with (
        EngineThread(engines[0]) as prefill,
        EngineThread(engines[1]) as decode,
        KvReceiver(
            decode,
            ReceivingGroup.single(engines[1].runner.pool, transfer),
            receiver_id="d0",
            model_digest="abc",
            config=transfer,
        ) as receiver,
        KvSender(
            SendingGroup.single(engines[0].runner.pool, transfer),
            sender_id="p0",
            model_digest="abc",
            open_channel=open_channel,
            config=transfer,
        ) as sender,
    ):
        if data_port is not None:
            (offer,) = receiver._offers
            assert offer.tcp is not None
            port = await data_port(offer.tcp.port)
            receiver._offers = (replace(offer, tcp=replace(offer.tcp, port=port)),)
        prefiller = Prefiller(prefill, sender, hash_salt_of=engines[0].model_config.rope_salt)
        decoder = DecodeServicer(decode, receiver)

        def add_to_prefill(server: aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(
                PrefillServicer(prefiller), server
            )

        def add_to_decode(server: aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(decoder, server)
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(receiver), server
            )

        async with (
            listening(add_to_prefill, address="127.0.0.1:0", drain_grace_s=0) as prefill_port,
            listening(add_to_decode, address="127.0.0.1:0", drain_grace_s=0) as decode_port,
            gateway_over_started(
                SmallWorker("p0", registry_pb2.WORKER_ROLE_PREFILL, f"127.0.0.1:{prefill_port}"),
                SmallWorker("d0", registry_pb2.WORKER_ROLE_DECODE, f"127.0.0.1:{decode_port}"),
            ) as gateway,
        ):
            yield SmallMesh(gateway, prefill, decode, sender, receiver)
