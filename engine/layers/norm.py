"""Root-mean-square norm, alone or fused with the residual addition before it.

Shape suffixes: T tokens of this step, D model dim.
"""

import torch

from engine.kernels.interface import Kernels
from engine.parallel.shard import ShardedModule, ShardSpec


class NormWeight(ShardedModule):
    """A norm's scale on its own, for norms that run inside another kernel."""

    weight_D: torch.Tensor

    def __init__(self, size: int, *, name: str) -> None:
        super().__init__(
            (
                ShardSpec(
                    tensor=f"{name}.weight",
                    full_shape=(size,),
                    parameter="weight_D",
                    length=size,
                ),
            )
        )
        self._declare("weight_D", size)


class RmsNorm(NormWeight):
    """Normalises each token; replicated on every rank."""

    def __init__(self, size: int, eps: float, *, name: str, kernels: Kernels) -> None:
        super().__init__(size, name=name)
        self._eps = eps
        self._kernels = kernels

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x_TD, self.weight_D, self._eps)

    def add(self, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        """residual_TD += x_TD in place; returns the norm of the sum."""
        return self._kernels.add_rms_norm(x_TD, residual_TD, self.weight_D, self._eps)
