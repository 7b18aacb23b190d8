"""A store and workers that share prefixes through it: real gRPC, Redis and data planes, no model.

A worker's engine writes bytes that follow from the tokens so far, so that a test can tell whose
KV a block holds.
"""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from grpc import aio
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis

from engine.kv_cache.layout import KvLayout
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Engine
from engine.runtime.engine_thread import EngineThread
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.step_plan import StepPlan
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.prefix.engine import FetchingEngine
from kv_transfer.prefix.fetcher import PrefixFetcher
from kv_transfer.prefix.lender import PrefixLender
from kv_transfer.prefix.publisher import PrefixPublisher
from kv_transfer.prefix.sharing import sharing_prefixes
from kv_transfer.prefix.stores import Stores
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.servicer import KvTransferServicer
from kv_transfer.store.block_store import BlockStore
from kv_transfer.store.memory import StoreMemory
from kv_transfer.store.servicer import KvStoreServicer
from kv_transfer.store.spill import CHECKSUM_BYTES, Spill
from mesh.channel import open_channel
from mesh.registry import registered
from mesh.server import listening
from mesh.worker import WorkerIdentity
from protos.isthmus.v1 import kv_store_pb2_grpc, kv_transfer_pb2_grpc
from protos.isthmus.v1.registry_pb2 import (
    WORKER_ROLE_PREFILL,
    WORKER_ROLE_STORE,
    WorkerRecord,
)
from tests.fakes.engine import VOCAB_SIZE, ListSink
from tests.fakes.kv_memory import HostMemory
from tests.fakes.kv_pair import FAST
from tests.fakes.step_engine import FakeExecutor

DIGEST = "abc"
LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=8, block_size_tokens=16, dtype="bfloat16")
SIZE = LAYOUT.block_size_tokens
_numbers = itertools.count()


def kv_byte(token_ids: Sequence[int], position: int) -> int:
    """What stands in every byte of a token's slot."""
    return (sum(token_ids[: position + 1]) * 31 + position * 7 + 1) % 251


def expected_kv(token_ids: Sequence[int], num_tokens: int) -> list[int]:
    return [kv_byte(token_ids, position) for position in range(num_tokens)]


class WritingExecutor(FakeExecutor):
    """Also writes the KV of what it is asked to compute."""

    def __init__(self, memory: HostMemory) -> None:
        super().__init__()
        self.scheduler: Scheduler | None = None
        self._memory = memory

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        assert self.scheduler is not None
        for chunk in plan.chunks:
            token_ids = self.scheduler.sequence(chunk.request_id).token_ids
            for offset in range(len(chunk.token_ids)):
                index, slot = divmod(chunk.first_position + offset, SIZE)
                value = kv_byte(token_ids, chunk.first_position + offset)
                self._memory.blocks()[chunk.block_ids[index], :, :, :, slot] = value
        super().begin(plan, num_threads)


@dataclass(slots=True)
class StoreProcess:
    blocks: BlockStore
    servicer: KvStoreServicer
    receiver: KvReceiver
    sender: KvSender
    address: str
    store_id: str

    @property
    def held(self) -> tuple[int, int, int, int]:
        """All gauges that must be zero when nobody uses the store."""
        shelf, counters = self.blocks.shelf, self.receiver.counters
        leases = counters.num_live_leases + counters.num_quarantined_leases
        return shelf.num_pinned, shelf.num_arriving, self.servicer.num_fetches, leases


@asynccontextmanager
async def running_store(
    redis: Redis,
    *,
    num_blocks: int = 64,
    spill_dir: Path | None = None,
    num_spill_blocks: int = 1000,
    plane: DataPlane = DataPlane.AUTO,
    layout: KvLayout = LAYOUT,
) -> AsyncIterator[StoreProcess]:
    """In the registry and answering inside the block."""
    config = replace(FAST, data_plane=plane)
    store_id = f"store-{next(_numbers)}"
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(StoreMemory(layout, num_blocks))
        spill = None
        if spill_dir is not None:
            max_bytes = num_spill_blocks * (layout.block_bytes + CHECKSUM_BYTES)
            spill = stack.enter_context(
                Spill(spill_dir, block_bytes=layout.block_bytes, max_bytes=max_bytes)
            )
        blocks = BlockStore(memory, spill)
        receiver = await stack.enter_async_context(
            KvReceiver(
                blocks,
                ReceivingGroup.single(memory, config),
                receiver_id=store_id,
                model_digest=DIGEST,
                config=config,
                shares_prefixes=False,
            )
        )
        sender = await stack.enter_async_context(
            KvSender(
                SendingGroup.single(memory, config),
                sender_id=store_id,
                model_digest=DIGEST,
                open_channel=open_channel,
                config=config,
            )
        )
        servicer = KvStoreServicer(blocks, sender, model_digest=DIGEST)

        def add(server: aio.Server) -> None:
            kv_store_pb2_grpc.add_KvStoreServiceServicer_to_server(servicer, server)
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(receiver), server
            )

        port = await stack.enter_async_context(
            listening(add, address="127.0.0.1:0", drain_grace_s=0)
        )
        record = WorkerRecord(
            worker_id=store_id,
            role=WORKER_ROLE_STORE,
            address=f"127.0.0.1:{port}",
            model_digest=DIGEST,
        )
        await stack.enter_async_context(registered(redis, lambda: record))
        yield StoreProcess(blocks, servicer, receiver, sender, record.address, store_id)


@dataclass(slots=True)
class SharingWorker:
    engine: FetchingEngine
    thread: EngineThread
    executor: WritingExecutor
    scheduler: Scheduler
    memory: HostMemory
    fetcher: PrefixFetcher
    publisher: PrefixPublisher
    stores: Stores
    receiver: KvReceiver

    async def generate(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        request_id: str = "r",
        mode: SequenceMode = SequenceMode.LOCAL,
    ) -> ListSink:
        """Run a request to its end."""
        sink = self.start(prompt, max_tokens=max_tokens, request_id=request_id, mode=mode)
        await sink.wait_until_over(request_id)
        if mode is SequenceMode.PREFILL:
            await self.engine.abort(request_id)
        return sink

    def start(
        self,
        prompt: Sequence[int],
        *,
        max_tokens: int = 1,
        request_id: str = "r",
        mode: SequenceMode = SequenceMode.LOCAL,
    ) -> ListSink:
        sink = ListSink()
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=max_tokens),
        )
        self.engine.submit(request, mode, sink)
        return sink

    def cached_kv(self, token_ids: Sequence[int]) -> list[int]:
        """What the cached blocks of a sequence hold, token by token; each slot is uniform."""
        hashes = block_hashes(token_ids, SIZE)
        block_ids = self.scheduler.block_pool.cached_prefix(hashes)
        kv_TLJGX = self.memory.tokens(block_ids, 0, len(block_ids) * SIZE)
        flat = kv_TLJGX.reshape(len(kv_TLJGX), -1)
        assert np.all(flat == flat[:, :1]), "a slot was written in part"
        return [int(value) for value in flat[:, 0]]

    @property
    def num_free_blocks(self) -> int:
        return self.scheduler.block_pool.num_free


@asynccontextmanager
async def sharing_worker(
    redis_url: str,
    *,
    num_blocks: int = 64,
    plane: DataPlane = DataPlane.AUTO,
    config: TransferConfig = FAST,
) -> AsyncIterator[SharingWorker]:
    """A worker of one rank that knows every store in the registry."""
    config = replace(config, data_plane=plane)
    identity = WorkerIdentity.new(
        WORKER_ROLE_PREFILL,
        model_id="m",
        model_digest=DIGEST,
        max_context_tokens=10_000,
        parallel="",
    )
    limits = EngineLimits(
        vocab_size=VOCAB_SIZE,
        max_context_tokens=10_000,
        num_blocks=num_blocks,
        block_size_tokens=SIZE,
    )
    scheduler = Scheduler(limits, max_num_sequences=8, eos_token_ids=frozenset())
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(HostMemory(num_blocks, LAYOUT).fill_randomly(seed=3))
        executor = WritingExecutor(memory)
        executor.scheduler = scheduler
        engine = Engine(scheduler, executor, CoreShare.alone(1), max_num_batched_tokens=64)
        thread = await stack.enter_async_context(EngineThread(engine))
        lender = PrefixLender(thread, thread, block_size_tokens=SIZE)
        receiver = await stack.enter_async_context(
            KvReceiver(
                lender,
                ReceivingGroup.single(memory, config),
                receiver_id=identity.worker_id,
                model_digest=DIGEST,
                config=config,
            )
        )

        def add(server: aio.Server) -> None:
            kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(
                KvTransferServicer(receiver), server
            )

        port = await stack.enter_async_context(
            listening(add, address="127.0.0.1:0", drain_grace_s=0)
        )
        sharing = await stack.enter_async_context(
            sharing_prefixes(
                thread,
                SendingGroup.single(memory, config),
                receiver,
                lender,
                hash_salt_of=lambda num_prompt_tokens: 0,
                identity=identity,
                redis_url=redis_url,
                config=config,
                metrics=CollectorRegistry(),
            )
        )
        sharing.start_fetching(f"127.0.0.1:{port}")
        yield SharingWorker(
            sharing.engine,
            thread,
            executor,
            scheduler,
            memory,
            sharing.fetcher,
            sharing.publisher,
            sharing.stores,
            receiver,
        )
