"""From a checkpoint on disk to a model that computes."""

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.read import read_config
from engine.errors import CheckpointError
from engine.kernels.interface import Kernels
from engine.layers.rope import RotaryEmbedding
from engine.models.causal_lm import CausalLM
from engine.parallel.axes import ParallelAxes
from engine.parallel.expert_placement import ExpertPlacement
from engine.weights.loader import load, tensors_of
from engine.weights.source import WeightSource, open_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_ROWS_COMPARED = 4096
"""At a time, of an embedding and an LM head that may be the same."""


def resolve_dtype(dtype: str, config: ModelConfig) -> torch.dtype:
    """Turn what an operator may say ("auto" or a name) into a dtype.

    Raises:
        ValueError: it is neither.
    """
    name = config.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {sorted(DTYPES)}, got {dtype!r}")
    return DTYPES[name]


def build(
    config: ModelConfig,
    *,
    axes: ParallelAxes,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    placements: Mapping[int, ExpertPlacement] = MappingProxyType({}),
) -> CausalLM:
    """Make a model without weights: its parameters are on the meta device, `dtype` wide.

    Args:
        config: of the checkpoint.
        axes: this rank's place.
        kernels: see `load_model`.
        dtype: of the weights.
        device: where they will go; the angles of the rotary embedding are there already.
        placements: where the experts of a layer stand; evenly in layers that are not named.
    """
    rope = RotaryEmbedding(config.rope, config.rotary_dim, device)
    local_rope = None
    if config.local_rope is not None:
        local_rope = RotaryEmbedding(config.local_rope, config.rotary_dim, device)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return CausalLM(
                config,
                axes=axes,
                kernels=kernels,
                rope=rope,
                local_rope=local_rope,
                placements=placements,
            )
    finally:
        torch.set_default_dtype(default)


def load_model(
    path: Path,
    *,
    kernels: Kernels,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    axes: ParallelAxes | None = None,
    placements: Mapping[int, ExpertPlacement] = MappingProxyType({}),
) -> CausalLM:
    """Read configuration and weights of a directory or .gguf file; the model is ready to run.

    Args:
        path: see `engine.checkpoint.locate_model`.
        kernels: made for the same device and dtype: see `resolve_dtype` and `read_config`.
        dtype: auto (the checkpoint's own), float32, bfloat16 or float16.
        device: where the weights go.
        axes: this rank's place; None is one rank alone.
        placements: see `build`; the same on every rank.

    Every rank checks all of the checkpoint's names and shapes, and reads its own slices only.

    Raises:
        CheckpointError: a file is missing, truncated, or does not fit the configuration.
        ValueError: the axes have more ranks than the model can be split over.
    """
    config = read_config(path)
    with open_weights(path, config) as weights:
        config = dataclasses.replace(config, tie_word_embeddings=_is_tied(config, weights))
        num_parts = config.num_layers
        if config.form.experts is not None:
            num_parts += config.form.experts.num_experts * len(config.form.experts.layers)
        if num_parts > len(weights.names):
            raise CheckpointError(
                f"{path}: the configuration has {num_parts} layers and experts, the weights hold "
                f"only {len(weights.names)} tensors"
            )
        target, weight_dtype = torch.device(device), resolve_dtype(dtype, config)

        make = partial(build, config, kernels=kernels, dtype=weight_dtype, device=target)
        single = ParallelAxes.single()
        try:
            whole = make(axes=single)
            if axes is None or axes == single:
                model = whole
            else:
                model = make(axes=axes, placements=placements)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        load(
            model,
            weights,
            tensors_of(whole),
            kernels=kernels,
            device=target,
            unused_tensors=config.unused_tensors,
        )
    return model


def _is_tied(config: ModelConfig, weights: WeightSource) -> bool:
    """A checkpoint that holds an LM head unlike its embedding is not tied, whatever it says."""
    if not config.tie_word_embeddings or "lm_head.weight" not in weights.names:
        return config.tie_word_embeddings
    names = ("model.embed_tokens.weight", "lm_head.weight")
    num_rows, *others = {weights.shape(name)[0] for name in names}
    if others:
        return False
    for start in range(0, num_rows, _ROWS_COMPARED):
        length = min(_ROWS_COMPARED, num_rows - start)
        embedding, head = (weights.read(name, 0, start, length) for name in names)
        if not torch.equal(embedding, head):
            return False
    return True
