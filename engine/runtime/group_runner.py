"""Rank 0 of several: tells the others what to compute, then computes its own part."""

from collections.abc import Callable

import torch

from engine.errors import RankGroupError
from engine.kv_cache.pool import KvPool
from engine.models.causal_lm import CausalLM
from engine.runtime.followers import Followers
from engine.runtime.rank_message import ExpertTokens, RankReport, RankTimes, StartCounting, Step
from engine.runtime.rank_runner import RankRunner
from engine.scheduling.data_shard import plans_by_shard
from engine.scheduling.micro_batch import best_num_micro_batches
from engine.scheduling.step_plan import StepPlan


class GroupRunner:
    """Implements StepRunner."""

    def __init__(
        self,
        local: RankRunner,
        followers: Followers,
        *,
        micro_batch_overhead_tokens: int,
        num_micro_batches: int | None = None,
    ) -> None:
        """Put rank 0 together.

        Args:
            local: rank 0's own part; its pool is closed with this.
            followers: closed with this.
            micro_batch_overhead_tokens: see `EngineConfig`.
            num_micro_batches: see `EngineConfig`.
        """
        self._local = local
        self._followers = followers
        self._overhead_tokens = micro_batch_overhead_tokens
        self._num_micro_batches = num_micro_batches

    @property
    def model(self) -> CausalLM:
        return self._local.runner.model

    @property
    def pool(self) -> KvPool:
        return self._local.runner.pool

    @property
    def num_data_shards(self) -> int:
        return self._local.num_data_shards

    @property
    def max_num_plans(self) -> int:
        return self._local.max_num_plans

    @property
    def times(self) -> list[RankTimes]:
        """Of every rank, the followers' as they last said; any thread may ask."""
        return [report.times for report in self.reports]

    @property
    def reports(self) -> list[RankReport]:
        """By rank, the followers' as they last said; any thread may ask."""
        return [self._local.report, *self._followers.reports]

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        layout = self._local.group.layout
        shards = plans_by_shard(plan, self.num_data_shards, self.pool.num_blocks)
        num = self._num_micro_batches or best_num_micro_batches(
            max(shard.num_tokens for shard in shards),
            layout.pp,
            layout.interleave,
            overhead_tokens=self._overhead_tokens,
        )
        number, is_watched = self._local.runner.announce(plan)
        step = Step(plan, num, number, is_watched)
        self._followers.send(step)
        try:
            self._local.begin(step, num_threads)
        except RankGroupError as error:
            raise self._followers.explained(error) from error

    def finish(self) -> torch.Tensor:
        try:
            return self._local.finish()
        except RankGroupError as error:
            raise self._followers.explained(error) from error

    @property
    def expert_tokens(self) -> list[ExpertTokens]:
        return [report.expert_tokens for report in self.reports]

    def start_counting(self) -> None:
        self._local.runner.start_counting()
        self._followers.send(StartCounting())

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        def fail(failure: RankGroupError) -> None:
            on_failure(failure)  # first: it ends an engine that waits for commands
            self._local.group.abort(str(failure))  # and this one that waits in a collective

        self._followers.start_watching(fail)

    def tell(self) -> None:
        self._local.runner.tell()

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        self._local.runner.watch_steps(on_step)

    def close(self) -> None:
        self._followers.close()
        self._local.runner.close()
