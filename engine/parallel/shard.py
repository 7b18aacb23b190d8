"""Which slice of which checkpoint tensor goes where in a module's parameters."""

from dataclasses import dataclass

import torch
from torch import nn

from engine.kernels.interface import Kernels


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardSpec:
    """[start, start + length) of a checkpoint tensor goes to [offset, offset + length)."""

    tensor: str
    """Name in a Hugging Face checkpoint."""
    full_shape: tuple[int, ...]
    """What the checkpoint must hold under that name."""
    parameter: str
    """Attribute of the module that declares this."""
    dim: int = 0
    start: int = 0
    length: int
    offset: int = 0


class ShardedModule(nn.Module):
    """A module whose parameters are filled from a checkpoint as its `shards` say.

    The loader fills all parameters of a module, calls `pack` once, and goes on to the next module
    in the order of `modules()`.
    """

    def __init__(self, shards: tuple[ShardSpec, ...]) -> None:
        super().__init__()
        self.shards = shards

    def pack(self, kernels: Kernels) -> None:
        """Bring the filled parameters into the form that `kernels` wants."""

    def _declare(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """Register a parameter on the current default device, of its dtype unless one is named."""
        values = torch.empty(shape, dtype=dtype)
        self.register_parameter(name, nn.Parameter(values, requires_grad=False))
