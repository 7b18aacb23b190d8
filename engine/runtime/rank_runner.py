"""One rank's part of a step that several ranks compute, and where its time goes.

Shape suffixes: B drawing chunks, V vocabulary.
"""

import time

import torch

from engine.parallel.rank_group import RankGroup
from engine.runtime.rank_message import RankTimes
from engine.runtime.runner import ModelRunner
from engine.scheduling.micro_batch import cut_into_micro_batches
from engine.scheduling.step_plan import StepPlan


class RankRunner:
    """Runs every plan that the leader hands out, on the leader itself too."""

    def __init__(self, runner: ModelRunner, group: RankGroup) -> None:
        self.runner = runner
        self.group = group
        self.times = RankTimes(rank=group.rank)
        """A snapshot that any thread may read."""

    def run(self, plan: StepPlan, num_micro_batches: int, num_threads: int) -> torch.Tensor:
        """Compute this rank's part of `plan`; every rank of the worker calls it.

        Collectives, in order: for each micro-batch those of `CausalLM.forward` and of the LM head.

        Returns:
            logits_BV of all drawing chunks on rank 0; others may return anything.
        """
        start_s = time.perf_counter()
        batches = cut_into_micro_batches(plan, num_micro_batches)
        parts = [self.runner.run(batch, num_threads) for batch in batches]
        drawn = [part_BV for part_BV in parts if part_BV.shape[0]]
        logits_BV = torch.cat(drawn) if len(drawn) > 1 else [*drawn, parts[-1]][0]
        self._count(time.perf_counter() - start_s, waited_s=0.0)
        return logits_BV

    def _count(self, step_s: float, *, waited_s: float) -> None:
        """Add one step; `waited_s` is the time that other pipeline stages let this one wait."""
        traffic, before = self.group.traffic.take(), self.times
        self.times = RankTimes(
            rank=before.rank,
            num_steps=before.num_steps + 1,
            step_s=before.step_s + step_s,
            busy_s=before.busy_s + step_s - waited_s,
            communication_s=before.communication_s + traffic.seconds,
            communication_bytes=before.communication_bytes + traffic.num_bytes,
        )
