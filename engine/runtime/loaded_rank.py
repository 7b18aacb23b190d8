"""What one rank has loaded: its part of the model, and how large its KV pool may be."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.digest import model_digest
from engine.checkpoint.read import read_config
from engine.config import EngineConfig
from engine.kernels import choose_kernels
from engine.kv_cache.full_layout import full_kv_layout
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
from engine.runtime.expert_counts import share_placements, wanted_placements
from engine.runtime.rank_message import Facts
from engine.runtime.rank_runner import RankRunner
from engine.runtime.runner import ModelRunner
from engine.scheduling.limits import EngineLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedRank:
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

    def facts(self, model_path: Path, config: EngineConfig, group: RankGroup) -> Facts:
        """What rank 0 compares."""
        return Facts(
            layout=str(group.layout),
            model_digest=model_digest(model_path),
            dtype=str(self.model.dtype).removeprefix("torch."),
            kv_dtype=self.layout.dtype,
            block_size_tokens=config.block_size_tokens,
            max_context_tokens=self.max_context_tokens,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_sequences=config.max_num_sequences,
            num_blocks=self.num_blocks,
            kv_share=self.kv_share,
        )


def load_rank(
    model_path: Path,
    config: EngineConfig,
    cores: CoreShare,
    group: RankGroup | None,
    *,
    is_for_prompts: bool = False,
) -> LoadedRank:
    """Read this rank's part of the weights and plan its pool; `group` is None for one rank alone.

    Raises:
        CheckpointError: the model cannot be loaded.
        KvPoolTooSmallError: no sequence fits; the text names what to change.
        ValueError: a setting does not fit the model or this machine.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, read_config(model_path))
    kernels = choose_kernels(device, dtype, cores.most_threads)
    dtype_name = str(dtype).removeprefix("torch.")
    axes = ParallelAxes.single() if group is None else group.axes
    axes = replace(axes, is_for_prompts=is_for_prompts)
    model = load_model(
        model_path,
        dtype=dtype_name,
        device=device,
        kernels=kernels,
        axes=axes,
        placements=_placements(model_path, config, axes),
    )
    max_context_tokens = _max_context_tokens(model.config, config)
    layout = replace(
        full_kv_layout(model.config, config),
        num_layers=len(model.stage_layers),
        num_kv_heads=len(model.kv_heads),
    )
    plan = plan_kv_pool(
        config,
        layout,
        device_type=device.type,
        free_bytes=_free_bytes(device),
        max_context_tokens=max_context_tokens,
    )
    logger.info(
        "kv_pool dtype=%s blocks=%d bytes=%d tokens=%d",
        layout.dtype,
        plan.num_blocks,
        plan.num_bytes,
        plan.num_blocks * layout.block_size_tokens,
    )
    return LoadedRank(model, layout, device, max_context_tokens, plan.num_blocks, axes.dp)


def _placements(
    model_path: Path, config: EngineConfig, axes: ParallelAxes
) -> Mapping[int, ExpertPlacement]:
    """Where the experts of each layer stand; what rank 0 says holds for all ranks."""
    experts = read_config(model_path).form.experts
    if experts is None or axes.ep.size == 1:
        return {}
    wanted = None
    if axes.world.rank == 0:
        wanted = wanted_placements(config, experts, model_path, num_ranks=axes.ep.size)
    return share_placements(wanted, axes.world)


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
