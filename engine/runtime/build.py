"""From a checkpoint and a configuration to an engine: the one door for workers."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import psutil
import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.digest import model_digest
from engine.checkpoint.read import read_config
from engine.config import EngineConfig
from engine.kernels import choose_kernels
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.kv_cache.pool_plan import plan_kv_pool
from engine.kv_cache.share import KvShare
from engine.models.build import load_model, resolve_dtype
from engine.models.causal_lm import CausalLM
from engine.parallel.axes import AxisGroup, ParallelAxes
from engine.parallel.expert_placement import ExpertPlacement
from engine.parallel.rank_group import RankGroup
from engine.parallel.traffic import Traffic
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Engine
from engine.runtime.expert_counts import share_placements, wanted_placements, write_counts
from engine.runtime.follower import Follower
from engine.runtime.followers import fewest_blocks
from engine.runtime.group_runner import GroupRunner
from engine.runtime.membership import Membership
from engine.runtime.model_executor import ModelExecutor
from engine.runtime.rank_message import (
    ExpertTokens,
    Facts,
    RankTimes,
    max_report_bytes,
    max_step_bytes,
)
from engine.runtime.rank_runner import RankRunner
from engine.runtime.runner import ModelRunner, StepRunner
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sharded_scheduler import ShardedScheduler

logger = logging.getLogger(__name__)


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


def resolve_device(device: str) -> torch.device:
    """Turn auto, cpu or cuda into a device.

    Raises:
        ValueError: cuda was asked for and there is none.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch finds no CUDA device; use cpu or auto")
    return torch.device(device)


@dataclass(frozen=True, slots=True)
class _LoadedRank:
    """One rank's model, and the memory that it has for KV."""

    model: CausalLM
    layout: KvLayout
    device: torch.device
    max_context_tokens: int
    num_blocks: int
    data: AxisGroup
    """The ranks among which requests are split."""

    @property
    def kv_share(self) -> KvShare:
        model = self.model
        return KvShare(model.stage_layers, tuple(model.kv_heads), self.data.rank)

    def limits(self, num_blocks: int) -> EngineLimits:
        return EngineLimits(
            vocab_size=self.model.config.vocab_size,
            max_context_tokens=self.max_context_tokens,
            num_blocks=num_blocks,
            block_size_tokens=self.layout.block_size_tokens,
            num_data_shards=self.data.size,
        )

    def runner(self, num_blocks: int) -> ModelRunner:
        """Of a worker of one rank."""
        return ModelRunner(self.model, self._pool(num_blocks), self.device)

    def rank_runner(self, num_blocks: int, group: RankGroup) -> RankRunner:
        """One rank's part of a worker of several."""
        # Traffic of its own, so that waiting for other stages can be told from other collectives.
        pipeline = replace(group.axes.pp, traffic=Traffic())
        runner = ModelRunner(self.model, self._pool(num_blocks), self.device, pipeline)
        return RankRunner(runner, group, pipeline.traffic)

    def _pool(self, num_blocks: int) -> KvPool:
        return KvPool(self.layout, num_blocks, self.device)


def build_engine(
    model_path: Path,
    config: EngineConfig,
    *,
    cores: CoreShare | None = None,
    membership: Membership | None = None,
) -> ModelEngine:
    """Load a model, size its KV pool and put an engine together; `Engine.prepare` warms it up.

    Args:
        model_path: a Hugging Face directory or a .gguf file.
        config: what the operator asked for.
        cores: who else computes on this host; None is nobody.
        membership: of rank 0; None is one rank alone. Its followers are closed with the engine.

    Raises:
        CheckpointError: the model cannot be loaded.
        KvPoolTooSmallError: no sequence fits; the text names what to change.
        RankGroupError: another rank failed; the text names it.
        LayoutMismatchError: another rank was started differently.
    """
    cores = cores or CoreShare.alone(config.num_threads)
    runner: StepRunner
    if membership is None:
        loaded = _load_rank(model_path, config, cores, None)
        limits = loaded.limits(loaded.num_blocks)
        runner = loaded.runner(limits.num_blocks)
        kv_shares = [loaded.kv_share]
    else:
        followers = membership.followers
        assert followers is not None, "only rank 0 has an engine"
        try:
            loaded = _load_rank(model_path, config, cores, membership.group)
            facts = _facts(model_path, config, loaded, membership.group)
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
        max_num_tokens=config.max_num_batched_tokens,
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
            write_counts, config.expert_counts, model_digest=model_digest(model_path)
        )
    return engine


def build_follower(
    model_path: Path,
    config: EngineConfig,
    *,
    membership: Membership,
    cores: CoreShare | None = None,
) -> Follower:
    """Load the part of a model that any rank but 0 holds; `Follower.run` computes.

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
        loaded = _load_rank(model_path, config, cores, membership.group)
        facts = _facts(model_path, config, loaded, membership.group)
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


def _load_rank(
    model_path: Path, config: EngineConfig, cores: CoreShare, group: RankGroup | None
) -> _LoadedRank:
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, read_config(model_path))
    kernels = choose_kernels(device, dtype, cores.most_threads)
    dtype_name = str(dtype).removeprefix("torch.")
    axes = ParallelAxes.single() if group is None else group.axes
    model = load_model(
        model_path,
        dtype=dtype_name,
        device=device,
        kernels=kernels,
        axes=axes,
        placements=_placements(model_path, config, axes),
    )
    max_context_tokens = _max_context_tokens(model.config, config)
    layout = KvLayout(
        num_layers=len(model.stage_layers),
        num_kv_heads=len(model.kv_heads),
        head_dim=model.config.head_dim,
        num_parts=model.config.num_kv_parts,
        block_size_tokens=config.block_size_tokens,
        dtype=dtype_name,
    )
    plan = plan_kv_pool(
        config,
        layout,
        device_type=device.type,
        free_bytes=_free_bytes(device),
        max_context_tokens=max_context_tokens,
    )
    logger.info(
        "kv_pool blocks=%d bytes=%d tokens=%d",
        plan.num_blocks,
        plan.num_bytes,
        plan.num_blocks * layout.block_size_tokens,
    )
    return _LoadedRank(model, layout, device, max_context_tokens, plan.num_blocks, axes.dp)


def _placements(
    model_path: Path, config: EngineConfig, axes: ParallelAxes
) -> Mapping[int, ExpertPlacement]:
    """Where the experts of each layer stand; what rank 0 says holds for all ranks."""
    experts = read_config(model_path).form.experts
    if experts is None or axes.ep.size == 1:
        return {}
    wanted = None
    if axes.world.rank == 0:
        digest = model_digest(model_path)
        wanted = wanted_placements(config, experts, model_digest=digest, num_ranks=axes.ep.size)
    return share_placements(wanted, axes.world)


def _facts(model_path: Path, config: EngineConfig, loaded: _LoadedRank, group: RankGroup) -> Facts:
    return Facts(
        layout=str(group.layout),
        model_digest=model_digest(model_path),
        dtype=loaded.layout.dtype,
        block_size_tokens=config.block_size_tokens,
        max_context_tokens=loaded.max_context_tokens,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_num_sequences=config.max_num_sequences,
        num_blocks=loaded.num_blocks,
        kv_share=loaded.kv_share,
    )


def _max_context_tokens(model: ModelConfig, config: EngineConfig) -> int:
    if config.max_context_tokens is None:
        return model.max_context_tokens
    if config.max_context_tokens > model.max_context_tokens:
        raise ValueError(
            f"max_context_tokens is {config.max_context_tokens}, but the model was made for "
            f"{model.max_context_tokens}; lower it"
        )
    return config.max_context_tokens


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return int(free_bytes)
    return int(psutil.virtual_memory().available)
