"""From a checkpoint and a configuration to an engine: the one door for workers."""

import logging
from pathlib import Path

import psutil
import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.read import read_config
from engine.config import EngineConfig
from engine.kernels import choose_kernels
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.kv_cache.pool_plan import plan_kv_pool
from engine.models.build import load_model, resolve_dtype
from engine.parallel.axes import ParallelAxes
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Engine
from engine.runtime.model_executor import ModelExecutor
from engine.runtime.runner import ModelRunner
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler

logger = logging.getLogger(__name__)


class ModelEngine(Engine[ModelExecutor]):
    """An engine on a model, with what workers need to know of it."""

    @property
    def runner(self) -> ModelRunner:
        return self.executor.runner

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


def build_engine(
    model_path: Path,
    config: EngineConfig,
    *,
    axes: ParallelAxes | None = None,
    cores: CoreShare | None = None,
) -> ModelEngine:
    """Load a model, size its KV pool and put an engine together; `Engine.prepare` warms it up.

    Args:
        model_path: a Hugging Face directory or a .gguf file.
        config: what the operator asked for.
        axes: this rank's place; None is one rank alone.
        cores: who else computes on this host; None is nobody.

    Raises:
        CheckpointError: the model cannot be loaded.
        KvPoolTooSmallError: no sequence fits; the text names what to change.
    """
    axes = axes or ParallelAxes.single()
    cores = cores or CoreShare.alone(config.num_threads)
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.dtype, read_config(model_path))
    kernels = choose_kernels(device, dtype, cores.most_threads)
    dtype_name = str(dtype).removeprefix("torch.")
    model = load_model(model_path, dtype=dtype_name, device=device, kernels=kernels, axes=axes)
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
    limits = EngineLimits(
        vocab_size=model.config.vocab_size,
        max_context_tokens=max_context_tokens,
        num_blocks=plan.num_blocks,
        block_size_tokens=config.block_size_tokens,
    )
    scheduler = Scheduler(
        limits,
        max_num_sequences=config.max_num_sequences,
        eos_token_ids=model.config.eos_token_ids,
        has_prefix_cache=config.has_prefix_cache,
        hash_salt_of=model.config.rope_salt,
    )
    runner = ModelRunner(model, KvPool(layout, plan.num_blocks, device), device, axes.pp)
    executor = ModelExecutor(
        runner,
        eos_token_ids=model.config.eos_token_ids,
        max_num_tokens=config.max_num_batched_tokens,
    )
    return ModelEngine(
        scheduler,
        executor,
        cores,
        max_num_batched_tokens=config.max_num_batched_tokens,
        shared_step_tokens_per_thread=(
            config.shared_step_tokens_per_thread if device.type == "cpu" else None
        ),
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
