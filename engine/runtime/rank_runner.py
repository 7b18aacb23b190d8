"""One rank's part of a step that several ranks compute, and where its time goes.

Shape suffixes: B drawing chunks, V vocabulary.
"""

import time

import torch

from engine.parallel.layout import Axis
from engine.parallel.rank_group import RankGroup
from engine.parallel.traffic import Traffic
from engine.runtime.rank_message import RankTimes
from engine.runtime.runner import ModelRunner
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
        self._num_stages = layout.size(Axis.PP)
        self._last_stage_rank = (self._num_stages - 1) * layout.tp * layout.sp
        """The first rank of the last stage: it has the logits."""

    def run(self, plan: StepPlan, num_micro_batches: int, num_threads: int) -> torch.Tensor:
        """Compute this rank's part of `plan`; every rank of the worker calls it.

        Collectives, in order: for each micro-batch those of `ModelRunner.run`; then, with several
        stages, the last one's first rank sends to rank 0. So when rank 0 returns, every stage has
        written the KV of the whole plan.

        Returns:
            logits_BV of all drawing chunks on rank 0, in host memory where there are several
            stages; others may return anything.
        """
        start_s = time.perf_counter()
        batches = cut_into_micro_batches(plan, num_micro_batches)
        parts = [self.runner.run(batch, num_threads) for batch in batches]
        drawn = [part_BV for part_BV in parts if part_BV.shape[0]]
        logits_BV = torch.cat(drawn) if len(drawn) > 1 else [*drawn, parts[-1]][0]
        waited_s = 0.0
        if self._num_stages > 1:
            before_s = time.perf_counter()
            num_drawing = sum(chunk.is_drawing for chunk in plan.chunks)
            logits_BV = self._hand_to_leader(logits_BV, num_drawing)
            waited_s = time.perf_counter() - before_s
        self._count(time.perf_counter() - start_s, waited_s)
        return logits_BV

    def _hand_to_leader(self, logits_BV: torch.Tensor, num_drawing: int) -> torch.Tensor:
        """From the last stage to rank 0; a plan that draws nothing is acknowledged by one float."""
        world = self.group.axes.world
        if world.rank == self._last_stage_rank:
            world.send(logits_BV.cpu() if num_drawing else torch.zeros(1), 0)
        if world.rank != 0:
            return logits_BV
        if num_drawing == 0:
            world.receive(torch.empty(1), self._last_stage_rank)
            return torch.empty((0, 0))
        whole_BV = torch.empty((num_drawing, self.runner.model.config.vocab_size))
        return world.receive(whole_BV, self._last_stage_rank)

    def _count(self, step_s: float, waited_s: float) -> None:
        """Add one step; `waited_s` passed while the last stage's logits came."""
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
