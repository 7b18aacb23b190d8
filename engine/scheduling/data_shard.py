"""Block ids of a worker whose requests are split over data shards.

Each shard has blocks of its own, as many as any other. A block id counts over all of them, so that
it also names the shard: shard d has ids [d * num_blocks, (d + 1) * num_blocks). In the pools of the
shard's ranks blocks are counted from 0.
"""

from collections.abc import Sequence
from dataclasses import replace

from engine.scheduling.step_plan import StepPlan


def data_shard_of(block_id: int, num_blocks: int) -> int:
    """The shard whose `num_blocks` blocks this one is among."""
    return block_id // num_blocks


def pool_blocks(block_ids: Sequence[int], num_blocks: int) -> tuple[int, tuple[int, ...]]:
    """A sequence's shard, and its blocks as the pools of the shard's ranks count them.

    Raises:
        ValueError: there is no block, or they lie on several shards.
    """
    shards = {data_shard_of(block_id, num_blocks) for block_id in block_ids}
    if len(shards) != 1:
        raise ValueError(f"{len(block_ids)} blocks on data shards {sorted(shards)}")
    (shard,) = shards
    return shard, tuple(block_id - shard * num_blocks for block_id in block_ids)


def plans_by_shard(plan: StepPlan, num_shards: int, num_blocks: int) -> tuple[StepPlan, ...]:
    """Each shard's chunks, in order; there may be none."""
    if num_shards == 1:
        return (plan,)
    shards = [data_shard_of(chunk.block_ids[0], num_blocks) for chunk in plan.chunks]
    return tuple(
        StepPlan(tuple(chunk for chunk, of in zip(plan.chunks, shards, strict=True) if of == shard))
        for shard in range(num_shards)
    )


def with_pool_blocks(plan: StepPlan, shard: int, num_blocks: int) -> StepPlan:
    """A shard's plan with its blocks as the pools of the shard's ranks count them."""
    if shard == 0:
        return plan
    first = shard * num_blocks
    return StepPlan(
        tuple(
            replace(chunk, block_ids=tuple(block_id - first for block_id in chunk.block_ids))
            for chunk in plan.chunks
        )
    )
