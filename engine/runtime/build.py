"""From a checkpoint and a configuration to an engine: the one door for workers."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.digest import model_digest
from engine.config import EngineConfig
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.kv_cache.share import KvShare
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Engine
from engine.runtime.expert_counts import write_counts
from engine.runtime.follower import Follower
from engine.runtime.followers import fewest_blocks
from engine.runtime.group_runner import GroupRunner
from engine.runtime.loaded_rank import load_rank
from engine.runtime.membership import Membership
from engine.runtime.model_executor import ModelExecutor
from engine.runtime.rank_message import (
    ExpertTokens,
    RankTimes,
    max_report_bytes,
    max_step_bytes,
)
from engine.runtime.runner import StepRunner
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sharded_scheduler import ShardedScheduler


class ModelEngine(Engine[ModelExecutor]):
    """An engine on a model, with what workers need to know of it."""

    kv_shares: tuple[KvShare, ...] = ()
    """What each rank's pool holds, in rank order; set by `build_engine`."""
    keep_expert_tokens: Callable[[list[ExpertTokens]], None] | None = None
    """Called in the end with what was counted; set by `build_engine`."""

    def close(self) -> None:
        if self.keep_expert_tokens is not None:
            self.keep_expert_tokens(self.expert_tokens)
        super().close()

    @property
    def full_kv_layout(self) -> KvLayout:
        """The pool that one rank would have that held everything."""
        return replace(
            self.kv_pool.layout,
            num_layers=len({layer for share in self.kv_shares for layer in share.layers}),
            num_kv_heads=len({head for share in self.kv_shares for head in share.kv_heads}),
        )

    @property
    def runner(self) -> StepRunner:
        return self.executor.runner

    @property
    def rank_times(self) -> list[RankTimes]:
        """Of each rank of a worker with several; any thread may ask."""
        runner = self.executor.runner
        return runner.times if isinstance(runner, GroupRunner) else []

    @property
    def expert_tokens(self) -> list[ExpertTokens]:
        """By rank, of a mixture of experts; any thread may ask."""
        return self.executor.runner.expert_tokens

    @property
    def kv_pool(self) -> KvPool:
        return self.executor.runner.pool

    @property
    def model_config(self) -> ModelConfig:
        return self.executor.runner.model.config


def build_engine(
    model_path: Path,
    config: EngineConfig,
    *,
    cores: CoreShare | None = None,
    membership: Membership | None = None,
    is_for_prompts: bool = False,
) -> ModelEngine:
    """Load a model, size its KV pool and put an engine together; `Engine.prepare` warms it up.

    Args:
        model_path: a Hugging Face directory or a .gguf file.
        config: what the operator asked for.
        cores: who else computes on this host; None is nobody.
        membership: of rank 0; None is one rank alone. Its followers are closed with the engine.
        is_for_prompts: pipeline stages are cut for a worker that hardly decodes; the same on all
            ranks.

    Raises:
        CheckpointError: the model cannot be loaded.
        KvPoolTooSmallError: no sequence fits; the text names what to change.
        RankGroupError: another rank failed; the text names it.
        LayoutMismatchError: another rank was started differently.
    """
    cores = cores or CoreShare.alone(config.num_threads)
    runner: StepRunner
    if membership is None:
        loaded = load_rank(model_path, config, cores, None)
        limits = loaded.limits(loaded.num_blocks)
        runner = loaded.runner(limits.num_blocks)
        kv_shares = [loaded.kv_share]
    else:
        followers = membership.followers
        assert followers is not None, "only rank 0 has an engine"
        try:
            loaded = load_rank(
                model_path, config, cores, membership.group, is_for_prompts=is_for_prompts
            )
            facts = loaded.facts(model_path, config, membership.group)
        except Exception as error:
            followers.refuse(f"rank 0 failed: {error}")
            raise
        facts_of = followers.agree(facts, timeout_s=membership.config.join_timeout_s)
        experts = loaded.model.config.form.experts
        if experts is not None:
            followers.expect(max_report_bytes(len(experts.layers), experts.num_experts))
        num_blocks = fewest_blocks(facts_of)
        kv_shares = [facts_of[rank].kv_share for rank in sorted(facts_of)]
        limits = loaded.limits(num_blocks)
        runner = GroupRunner(
            loaded.rank_runner(num_blocks, membership.group),
            followers,
            micro_batch_overhead_tokens=config.micro_batch_overhead_tokens,
            num_micro_batches=config.num_micro_batches,
        )
    scheduler = (Scheduler if limits.num_data_shards == 1 else ShardedScheduler)(
        limits,
        max_num_sequences=config.max_num_sequences,
        eos_token_ids=loaded.model.config.eos_token_ids,
        has_prefix_cache=config.has_prefix_cache,
        hash_salt_of=loaded.model.config.rope_salt,
        max_num_plans=runner.max_num_plans,
    )
    executor = ModelExecutor(
        runner,
        eos_token_ids=loaded.model.config.eos_token_ids,
        max_num_tokens=min(config.max_num_batched_tokens, limits.max_context_tokens),
    )
    engine = ModelEngine(
        scheduler,
        executor,
        cores,
        max_num_batched_tokens=config.max_num_batched_tokens,
        shared_step_tokens_per_thread=(
            config.shared_step_tokens_per_thread if loaded.device.type == "cpu" else None
        ),
    )
    engine.kv_shares = tuple(kv_shares)
    if config.expert_counts is not None and loaded.model.config.form.experts is not None:
        engine.keep_expert_tokens = partial(
            write_counts, config.expert_counts, digest=model_digest(model_path)
        )
    return engine


def build_follower(
    model_path: Path,
    config: EngineConfig,
    *,
    membership: Membership,
    cores: CoreShare | None = None,
    is_for_prompts: bool = False,
) -> Follower:
    """Load the part of a model that any rank but 0 holds; `Follower.run` computes.

    Arguments are those of `build_engine`.

    Raises:
        CheckpointError: the model cannot be loaded; rank 0 has been told.
        KvPoolTooSmallError: no sequence fits; rank 0 has been told.
        LayoutMismatchError: rank 0 refuses; the text says why.
        RankDeadError: rank 0 is gone.
    """
    leader = membership.leader
    assert leader is not None, "rank 0 does not follow"
    cores = cores or CoreShare.alone(config.num_threads)
    try:
        loaded = load_rank(
            model_path, config, cores, membership.group, is_for_prompts=is_for_prompts
        )
        facts = loaded.facts(model_path, config, membership.group)
    except Exception as error:
        leader.tell_failure(error)
        raise
    limits = loaded.limits(leader.agree(facts))
    leader.expect(max_step_bytes(limits, config.max_num_batched_tokens, config.max_num_sequences))
    return Follower(
        loaded.rank_runner(limits.num_blocks, membership.group),
        leader,
        cores,
        limits,
        max_num_batched_tokens=config.max_num_batched_tokens,
    )
