"""Two workers of several ranks, all in this process, whose pools hold a known sequence."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from engine.kv_cache.layout import KvLayout
from engine.scheduling.block_pool import BlockPool
from kv_transfer.config import DataPlane
from kv_transfer.group_layout import GroupLayout
from kv_transfer.handover import TokenShard
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.rank.remote import RemoteRank
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.receiving_rank import ReceivingRank
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from kv_transfer.sending_rank import SendingRank
from mesh.channel import open_channel
from tests.fakes.engine import FakeEngine
from tests.fakes.kv_memory import HostMemory
from tests.fakes.kv_pair import FAST, serving

NUM_BLOCKS = 24
Bytes = npt.NDArray[np.uint8]


@dataclass(slots=True)
class KvGroups:
    sender: KvSender
    receiver: KvReceiver
    engine: FakeEngine
    sender_layout: GroupLayout
    local: Sequence[HostMemory]
    remote: Sequence[HostMemory]
    address: str

    def hold(
        self,
        kv_TLJGX: Bytes,
        block_ids: Sequence[int],
        shards: Sequence[TokenShard],
        *,
        data_shard: int = 0,
    ) -> None:
        """Write a sequence into the pools of a sender's data shard, by the pools' block ids: each
        rank what it holds of its own tokens."""
        for box, memory in zip(self.sender_layout.boxes, self.local, strict=True):
            if box.data_shard != data_shard:
                continue
            own = kv_TLJGX[:, box.layers][:, :, :, box.kv_heads]
            for shard in shards:
                if shard.token_shard == box.token_shard:
                    for token in range(shard.first_token, shard.end_token):
                        index, slot = divmod(token, memory.layout.block_size_tokens)
                        memory.blocks()[block_ids[index], :, :, :, slot] = own[token]

    def arrived(self, rank: int, block_ids: Sequence[int], num_tokens: int) -> Bytes:
        """The sequence as a receiving rank has it."""
        return self.remote[rank].tokens(block_ids, 0, num_tokens)


@asynccontextmanager
async def kv_groups(
    sender_layout: GroupLayout,
    receiver_layout: GroupLayout,
    *,
    plane: str = "shm",
    receiver_shard: int = 0,
    sending: Callable[[int, SendingRank], SendingRank] = lambda rank, local: local,
    receiving: Callable[[int, ReceivingRank], ReceivingRank] = lambda rank, local: local,
    follower: Callable[[str, int, KvLayout], Awaitable[tuple[HostMemory, RemoteRank]]]
    | None = None,
) -> AsyncIterator[KvGroups]:
    """Both workers, joined by real gRPC. All sequences go to one data shard of the receiver.

    `sending` and `receiving` may replace single ranks; `follower` makes all but rank 0 of each
    worker elsewhere, given worker id, rank and layout.
    """
    config = replace(FAST, data_plane=DataPlane(plane), rpc_timeout_s=20.0, lease_s=20.0)
    engine = FakeEngine(num_blocks=NUM_BLOCKS, block_size_tokens=receiver_layout.block_size_tokens)
    engine.block_pool = BlockPool(NUM_BLOCKS, receiver_shard * NUM_BLOCKS)
    async with AsyncExitStack() as stack:

        async def open_ranks(
            worker_id: str, layout: GroupLayout
        ) -> tuple[list[HostMemory], list[RemoteRank | None]]:
            memories: list[HostMemory] = []
            remotes: list[RemoteRank | None] = []
            for rank in range(layout.num_ranks):
                if rank and follower is not None:
                    memory, remote = await follower(worker_id, rank, layout.rank_layout(rank))
                    remotes.append(await stack.enter_async_context(remote))
                else:
                    memory = HostMemory(NUM_BLOCKS, layout.rank_layout(rank))
                    remotes.append(None)
                memories.append(stack.enter_context(memory).fill_randomly(len(worker_id) + rank))
            return memories, remotes

        local, far_sources = await open_ranks("prefill-0", sender_layout)
        remote, far_targets = await open_ranks("decode-0", receiver_layout)
        sources = [
            sending(rank, far or LocalSendingRank(memory, config))
            for rank, (memory, far) in enumerate(zip(local, far_sources, strict=True))
        ]
        targets = [
            receiving(rank, far or LocalReceivingRank(memory, config))
            for rank, (memory, far) in enumerate(zip(remote, far_targets, strict=True))
        ]
        receiver = await stack.enter_async_context(
            KvReceiver(
                engine,
                ReceivingGroup(receiver_layout, NUM_BLOCKS, targets),
                receiver_id="decode-0",
                model_digest="abc",
                config=config,
            )
        )
        address = await stack.enter_async_context(serving(receiver))
        sender = await stack.enter_async_context(
            KvSender(
                SendingGroup(sender_layout, NUM_BLOCKS, sources),
                sender_id="prefill-0",
                model_digest="abc",
                open_channel=open_channel,
                config=config,
            )
        )
        yield KvGroups(sender, receiver, engine, sender_layout, local, remote, address)
