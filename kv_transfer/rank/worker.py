"""How the ranks of one worker come together for handovers: rank 0's side and the others'."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing

from engine.runtime.build import ModelEngine
from engine.runtime.follower import Follower, follow
from kv_transfer.config import TransferConfig
from kv_transfer.group_layout import GroupLayout, RankBox
from kv_transfer.rank.remote import RemoteRank
from kv_transfer.rank.servicer import serving_rank
from mesh.channel import open_channel


def kv_layout_of(engine: ModelEngine) -> GroupLayout:
    """What each rank of the engine's worker holds."""
    boxes = (
        RankBox(share.layers, share.kv_heads, data_shard=share.data_shard)
        for share in engine.kv_shares
    )
    return GroupLayout(engine.full_kv_layout, tuple(boxes))


@asynccontextmanager
async def other_ranks(
    addresses: Sequence[str], config: TransferConfig, *, worker_id: str
) -> AsyncIterator[list[RemoteRank]]:
    """Ranks 1 and up inside the block, by the addresses that they said; none where there are none.

    `worker_id` is for texts.
    """
    async with AsyncExitStack() as stack:
        ranks = []
        for rank, address in enumerate(addresses, start=1):
            remote = RemoteRank(
                rank,
                address,
                open_channel(address),
                worker_id=worker_id,
                timeout_s=config.rpc_timeout_s,
            )
            ranks.append(await stack.enter_async_context(remote))
        yield ranks


async def serve_follower(
    follower: Follower, config: TransferConfig, *, host: str, reachable_host: str
) -> None:
    """Compute what rank 0 says and let it use the pool, until it ends this rank.

    Args:
        follower: closed in the end.
        config: of the worker.
        host: where the pool is served, on a free port.
        reachable_host: by which rank 0 reaches it.

    Raises:
        EngineDeadError: rank 0 or another rank is gone; as `Follower.run`.
    """
    with closing(follower):
        async with serving_rank(follower.pool, config, address=f"{host}:0") as port:
            await asyncio.to_thread(follower.say_serving, f"{reachable_host}:{port}")
            await follow(follower)
