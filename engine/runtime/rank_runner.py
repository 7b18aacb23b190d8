"""One rank's part of a step that several ranks compute, and where its time goes.

Shape suffixes: B drawing chunks, V vocabulary.
"""

import time
from collections import deque

import torch

from engine.parallel.rank_group import RankGroup
from engine.parallel.traffic import Traffic
from engine.runtime.rank_message import RankReport, RankTimes, Step
from engine.runtime.runner import ModelRunner
from engine.scheduling.data_shard import plans_by_shard, with_pool_blocks
from engine.scheduling.micro_batch import cut_into_micro_batches
from engine.scheduling.step_plan import StepPlan


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
        self._is_waiting = layout.pp * layout.dp > 1
        self._begun: deque[tuple[tuple[StepPlan, ...], torch.Tensor]] = deque()
        self._counted_s = 0.0
        """Until when this rank's time is counted."""

    @property
    def report(self) -> RankReport:
        """What is measured here; any thread may ask."""
        (expert_tokens,) = self.runner.expert_tokens
        return RankReport(self.times, expert_tokens)

    @property
    def max_num_plans(self) -> int:
        """One for each stage: then none need wait for another."""
        return self._num_stages

    def begin(self, step: Step, num_threads: int) -> None:
        """Compute this rank's part of a plan; every rank of the worker calls it.

        Every shard makes as many forward passes as the one with the most micro-batches. Sends and
        collectives are those of `ModelRunner.run`; then the ranks that have logits send them to
        rank 0, which receives them in `finish`.
        """
        start_s = time.perf_counter()
        if not self._begun:
            self._counted_s = start_s
        num_blocks, shard = self.runner.pool.num_blocks, self.group.axes.dp.rank
        num_micro_batches = step.num_micro_batches
        plans = plans_by_shard(step.plan, self.num_data_shards, num_blocks)
        own = with_pool_blocks(plans[shard], shard, num_blocks)
        batches = cut_into_micro_batches(own, num_micro_batches) if own.chunks else ()
        num_passes = max(min(num_micro_batches, each.num_tokens) for each in plans)
        logits_BV = self.runner.run(
            batches, num_passes, num_threads, step.number, is_watched=step.is_watched
        )
        world = self.group.axes.world
        if world.rank == 0:
            self._begun.append((plans, logits_BV))
        elif world.rank == self._drawing_ranks[shard] and own.chunks:
            world.send(logits_BV.cpu() if _num_drawing(own) else torch.zeros(1), 0)
        if world.rank != 0:
            self.runner.tell()
        self._count(time.perf_counter() - start_s, num_steps=1)

    def finish(self) -> torch.Tensor:
        """Wait, on rank 0, for the earliest plan that has begun.

        When it returns, every stage of every shard has written the KV of the whole plan.

        Returns:
            logits_BV of all drawing chunks, in host memory where there are several stages or
            shards.
        """
        plans, logits_BV = self._begun.popleft()
        if self._is_waiting:
            parts = [
                self._logits_from(rank, shard, logits_BV)
                for rank, shard in zip(self._drawing_ranks, plans, strict=True)
                if shard.chunks
            ]
            drawn = [part_BV for part_BV in parts if part_BV.shape[0]]
            logits_BV = torch.cat(drawn) if drawn else torch.empty((0, 0))
        self._count(0.0, num_steps=0)
        return logits_BV

    def _logits_from(self, rank: int, plan: StepPlan, own_BV: torch.Tensor) -> torch.Tensor:
        """A shard's; a plan that draws nothing is acknowledged by one float."""
        if rank == 0:
            return own_BV.cpu()
        num_drawing, world = _num_drawing(plan), self.group.axes.world
        if num_drawing == 0:
            world.receive(torch.empty(1), rank)
            return torch.empty((0, 0))
        whole_BV = torch.empty((num_drawing, self.runner.model.config.vocab_size))
        return world.receive(whole_BV, rank)

    def _count(self, computed_s: float, *, num_steps: int) -> None:
        """Add what passed since the last time, of which `computed_s` in `begin`."""
        collectives, pipeline = self.group.traffic.take(), self._pipeline.take()
        now_s, before = time.perf_counter(), self.times
        step_s, self._counted_s = now_s - self._counted_s, now_s
        busy_s = computed_s - pipeline.seconds if self._is_waiting else step_s
        self.times = RankTimes(
            rank=before.rank,
            num_steps=before.num_steps + num_steps,
            step_s=before.step_s + step_s,
            busy_s=before.busy_s + busy_s,
            communication_s=before.communication_s + collectives.seconds + pipeline.seconds,
            communication_bytes=(
                before.communication_bytes + collectives.num_bytes + pipeline.num_bytes
            ),
        )


def _num_drawing(plan: StepPlan) -> int:
    return sum(chunk.is_drawing for chunk in plan.chunks)
