"""Tensors of a checkpoint under their Hugging Face names, whatever file they are in."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from engine.checkpoint.config import ModelConfig
from engine.weights.block_scaled import BlockScaled
from engine.weights.gguf_source import GgufSource
from engine.weights.safetensors_source import SafetensorsSource
from engine.weights.stacked_experts import StackedExperts


class WeightSource(Protocol):
    """An open checkpoint."""

    path: Path
    names: frozenset[str]

    def shape(self, name: str) -> tuple[int, ...]:
        """The whole tensor's shape."""

    def location(self, name: str) -> str:
        """File and tensor as the user knows them, for error texts."""

    def read(
        self, name: str, dim: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        """Read [start, start + length) along `dim`, or all; may share memory with the file."""


def open_weights(path: Path, config: ModelConfig) -> AbstractContextManager[WeightSource]:
    """Open a directory or a .gguf file; tensors read stay valid after it is closed.

    Raises:
        CheckpointError: a file is missing, truncated or malformed.
    """
    if path.is_dir():
        source = SafetensorsSource(path)
        if config.scale_block_shape is not None:
            return BlockScaled(source, config.scale_block_shape)
        experts = config.form.experts
        return StackedExperts(source) if experts and experts.is_stacked else source
    return GgufSource(path, config)
