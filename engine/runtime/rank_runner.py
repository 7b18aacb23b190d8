"""One rank's part of a step that several ranks compute, and where its time goes.

Shape suffixes: B drawing chunks, V vocabulary.
"""

import time
from collections.abc import Sequence

import torch

from engine.parallel.rank_group import RankGroup
from engine.parallel.traffic import Traffic
from engine.runtime.rank_message import RankReport, RankTimes
from engine.runtime.runner import ModelRunner
from engine.scheduling.data_shard import plans_by_shard, with_pool_blocks
from engine.scheduling.micro_batch import cut_into_micro_batches
from engine.scheduling.step_plan import StepPlan

_NOTHING = torch.empty((0, 0))


class RankRunner:
    """Runs every plan that the leader hands out, on the leader itself too."""

    def __init__(self, runner: ModelRunner, group: RankGroup, pipeline: Traffic) -> None:
        """Take over one rank's runner; `pipeline` counts what it sends to other stages and gets."""
        self.runner = runner
        self.group = group
        self.times = RankTimes(rank=group.rank)
        """A snapshot that any thread may read."""
        self._pipeline = pipeline
        layout = group.layout
        self.num_data_shards = layout.dp
        self._num_stages = layout.pp
        shard_ranks = layout.num_ranks // layout.dp
        last_stage = (layout.pp - 1) * layout.tp * layout.sp
        self._drawing_ranks = [shard * shard_ranks + last_stage for shard in range(layout.dp)]
        """The first rank of each shard's last stage: it has the shard's logits."""

    @property
    def report(self) -> RankReport:
        """What is measured here; any thread may ask."""
        (expert_tokens,) = self.runner.expert_tokens
        return RankReport(self.times, expert_tokens)

    def run(self, plan: StepPlan, num_micro_batches: int, num_threads: int) -> torch.Tensor:
        """Compute this rank's part of `plan`; every rank of the worker calls it.

        Every shard makes as many forward passes as the one with the most micro-batches: without
        tokens it takes part in the experts' exchange. Collectives, in order: for each pass those
        of `ModelRunner.run` or `serve`; then each shard's logits go to rank 0 where another rank
        has them. So when rank 0 returns, every stage of every shard has written the KV of the
        whole plan.

        Returns:
            logits_BV of all drawing chunks on rank 0, in host memory where there are several
            stages or shards; others may return anything.
        """
        start_s = time.perf_counter()
        num_blocks, shard = self.runner.pool.num_blocks, self.group.axes.dp.rank
        plans = plans_by_shard(plan, self.num_data_shards, num_blocks)
        own = with_pool_blocks(plans[shard], shard, num_blocks)
        batches = cut_into_micro_batches(own, num_micro_batches) if own.chunks else ()
        num_passes = max(min(num_micro_batches, each.num_tokens) for each in plans)
        parts = [self.runner.run(batch, num_threads) for batch in batches]
        for _ in range(num_passes - len(batches)):
            self.runner.serve()
        drawn = [part_BV for part_BV in parts if part_BV.shape[0]]
        logits_BV = torch.cat(drawn) if len(drawn) > 1 else [*drawn, *parts[-1:], _NOTHING][0]
        waited_s = 0.0
        if len(self._drawing_ranks) > 1 or self._num_stages > 1:
            before_s = time.perf_counter()
            logits_BV = self._hand_to_leader(logits_BV, plans)
            waited_s = time.perf_counter() - before_s
        self._count(time.perf_counter() - start_s, waited_s)
        return logits_BV

    def _hand_to_leader(self, logits_BV: torch.Tensor, plans: Sequence[StepPlan]) -> torch.Tensor:
        """From each shard to rank 0; a plan that draws nothing is acknowledged by one float."""
        world = self.group.axes.world
        parts: list[torch.Tensor] = []
        for rank, plan in zip(self._drawing_ranks, plans, strict=True):
            num_drawing = sum(chunk.is_drawing for chunk in plan.chunks)
            if not plan.chunks:
                continue
            if world.rank == rank:
                own_BV = logits_BV.cpu()
                if rank == 0:
                    parts.append(own_BV)
                else:
                    world.send(own_BV if num_drawing else torch.zeros(1), 0)
            elif world.rank == 0 and num_drawing:
                whole_BV = torch.empty((num_drawing, self.runner.model.config.vocab_size))
                parts.append(world.receive(whole_BV, rank))
            elif world.rank == 0:
                world.receive(torch.empty(1), rank)
        drawn = [part_BV for part_BV in parts if part_BV.shape[0]]
        return torch.cat(drawn) if drawn else _NOTHING

    def _count(self, step_s: float, waited_s: float) -> None:
        """Add one step; `waited_s` passed while the logits of others came."""
        collectives, pipeline, before = (
            self.group.traffic.take(),
            self._pipeline.take(),
            self.times,
        )
        self.times = RankTimes(
            rank=before.rank,
            num_steps=before.num_steps + 1,
            step_s=before.step_s + step_s,
            busy_s=before.busy_s + step_s - waited_s - pipeline.seconds,
            communication_s=before.communication_s + collectives.seconds + pipeline.seconds,
            communication_bytes=(
                before.communication_bytes + collectives.num_bytes + pipeline.num_bytes
            ),
        )
