"""A prefill worker, a decode worker and a gateway in one process: real engines, real sockets."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from grpc import aio
from prometheus_client import CollectorRegistry

from decode_worker.servicer import DecodeServicer
from engine.config import EngineConfig
from engine.runtime.build import ModelEngine, build_engine
from engine.runtime.engine_thread import EngineThread
from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.sharing import PrefixSharing, sharing_prefixes
from kv_transfer.rank.worker import kv_layout_of
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from mesh.channel import open_channel
from mesh.server import listening
from mesh.worker import WorkerIdentity
from prefill_worker.prefill import Prefiller
from prefill_worker.servicer import PrefillServicer
from protos.isthmus.v1 import (
    decode_pb2_grpc,
    kv_transfer_pb2_grpc,
    prefill_pb2_grpc,
    registry_pb2,
)
from tests.fakes.gateway import MODEL_ID, RunningGateway, gateway_over_started
from tests.fakes.kv_store import DIGEST

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
class SmallRank:
    """What a worker of either role has inside."""

    layout: GroupLayout
    thread: EngineThread
    receiver: KvReceiver
    prefixes: PrefixSharing

    def held(self) -> dict[str, int]:
        """What its gauges show that is not zero."""
        stats, counters = self.thread.stats, self.receiver.counters
        gauges = {
            "blocks": stats.num_blocks - stats.num_free_blocks,
            "waiting": stats.num_waiting,
            "running": stats.num_running,
            "leases": counters.num_live_leases,
            "quarantined leases": counters.num_quarantined_leases,
            "waiting reservations": counters.num_waiting_reserves,
            "fetches": self.prefixes.fetcher.num_open,
            "prefixes to publish": self.prefixes.publisher.num_waiting,
        }
        return {name: count for name, count in gauges.items() if count}


@dataclass(frozen=True, slots=True)
class SmallMesh:
    gateway: RunningGateway
    prefill: SmallRank
    decode: SmallRank
    sender: KvSender

    def held(self) -> dict[str, int]:
        """What the gauges of both workers show that is not zero."""
        gauges = {"handovers": self.sender.counters.num_open_handovers}
        for name, worker in (("prefill", self.prefill), ("decode", self.decode)):
            gauges |= {f"{name} {what}": count for what, count in worker.held().items()}
        return {name: count for name, count in gauges.items() if count}


@asynccontextmanager
async def small_rank(
    worker_id: str,
    role: registry_pb2.WorkerRole,
    engine: ModelEngine,
    transfer: TransferConfig,
    redis_url: str,
) -> AsyncIterator[SmallRank]:
    """A worker without its service."""
    is_decode = role == registry_pb2.WORKER_ROLE_DECODE
    layout = kv_layout_of(engine)
    identity = WorkerIdentity(
        role=role,
        worker_id=worker_id,
        epoch=1,
        model_id=MODEL_ID,
        model_digest=DIGEST,
        max_context_tokens=512,
        parallel="",
    )
    async with (
        EngineThread(engine) as thread,
        KvReceiver(
            lender := PrefixLender(
                thread,
                thread if is_decode else None,
                block_size_tokens=layout.block_size_tokens,
            ),
            ReceivingGroup.single(engine.kv_pool, transfer),
            receiver_id=worker_id,
            model_digest=DIGEST,
            config=transfer,
            shares_prefixes=is_decode,
        ) as receiver,
        sharing_prefixes(
            thread,
            SendingGroup.single(engine.kv_pool, transfer),
            receiver,
            lender,
            hash_salt_of=engine.model_config.rope_salt,
            identity=identity,
            redis_url=redis_url,
            config=transfer,
            metrics=CollectorRegistry(),
        ) as prefixes,
    ):
        yield SmallRank(layout, thread, receiver, prefixes)


@asynccontextmanager
async def small_mesh(
    checkpoint: Path,
    transfer: TransferConfig,
    redis_url: str,
    *,
    data_port: Callable[[int], Awaitable[int]] | None = None,
    decode_pool_bytes: int = POOL_BYTES,
) -> AsyncIterator[SmallMesh]:
    """Start all three; the workers use the stores that Redis knows.

    Args:
        checkpoint: of VOCAB_SIZE tokens.
        transfer: of both workers.
        redis_url: where a store may register; the workers and the gateway do not.
        data_port: where the sender finds the data port that it is given; for relays.
        decode_pool_bytes: of the decode worker's KV pool.
    """
    pools = (POOL_BYTES, decode_pool_bytes)
    engines = [build_engine(checkpoint, replace(ENGINE, kv_pool_bytes=size)) for size in pools]
    prefill_role, decode_role = registry_pb2.WORKER_ROLE_PREFILL, registry_pb2.WORKER_ROLE_DECODE
    async with (
        small_rank("p0", prefill_role, engines[0], transfer, redis_url) as prefill,
        small_rank("d0", decode_role, engines[1], transfer, redis_url) as decode,
        KvSender(
            SendingGroup.single(engines[0].kv_pool, transfer),
            sender_id="p0",
            model_digest=DIGEST,
            open_channel=open_channel,
            config=transfer,
        ) as sender,
    ):
        if data_port is not None:
            (offer,) = decode.receiver._offers
            assert offer.tcp is not None
            port = await data_port(offer.tcp.port)
            decode.receiver._offers = (replace(offer, tcp=replace(offer.tcp, port=port)),)
        prefiller = Prefiller(
            prefill.prefixes.engine, sender, hash_salt_of=engines[0].model_config.rope_salt
        )
        decoder = DecodeServicer(decode.prefixes.engine, decode.receiver)

        def add_to_prefill(server: aio.Server) -> None:
            prefill_pb2_grpc.add_PrefillServiceServicer_to_server(
                PrefillServicer(prefiller), server
            )
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(prefill.receiver), server
            )

        def add_to_decode(server: aio.Server) -> None:
            decode_pb2_grpc.add_DecodeServiceServicer_to_server(decoder, server)
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(decode.receiver), server
            )

        async with (
            listening(add_to_prefill, address="127.0.0.1:0", drain_grace_s=0) as prefill_port,
            listening(add_to_decode, address="127.0.0.1:0", drain_grace_s=0) as decode_port,
            gateway_over_started(
                SmallWorker("p0", prefill_role, f"127.0.0.1:{prefill_port}"),
                SmallWorker("d0", decode_role, f"127.0.0.1:{decode_port}"),
            ) as gateway,
        ):
            prefill.prefixes.start_fetching(f"127.0.0.1:{prefill_port}")
            decode.prefixes.start_fetching(f"127.0.0.1:{decode_port}")
            yield SmallMesh(gateway, prefill, decode, sender)
