"""The gated feed-forward block.

Shape suffixes: T tokens of this step, D model dim.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import Kernels
from engine.parallel.axes import AxisGroup
from engine.parallel.linear import GateUpLinear, RowParallelLinear


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)): one all-reduce over the tensor axis."""

    def __init__(
        self, config: ModelConfig, *, name: str, axis: AxisGroup, kernels: Kernels
    ) -> None:
        super().__init__()
        self.gate_up = GateUpLinear(
            config.hidden_size,
            config.intermediate_size,
            names=(f"{name}.gate_proj", f"{name}.up_proj"),
            has_bias=config.mlp_bias,
            axis=axis,
            kernels=kernels,
        )
        self.down = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            name=f"{name}.down_proj",
            has_bias=config.mlp_bias,
            axis=axis,
            kernels=kernels,
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.down(self.gate_up(x_TD))
        return y_TD
