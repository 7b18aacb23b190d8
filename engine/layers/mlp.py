"""The gated feed-forward block.

Shape suffixes: T tokens of this step, D model dim.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import Kernels, MlpParts
from engine.layers.norm import RmsNorm
from engine.parallel.axes import AxisGroup
from engine.parallel.linear import GateUpLinear, RowParallelLinear, feature_spans


class Mlp(nn.Module):
    """This rank's summand of down(activation(gate(x)) * up(x)); no collectives.

    Also an expert and a shared expert, with names and a width of its own.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        name: str,
        intermediate_size: int,
        has_bias: bool,
        axis: AxisGroup,
        kernels: Kernels,
        gate_up_names: tuple[str, ...],
        down_name: str = "down_proj",
    ) -> None:
        super().__init__()
        self.gate_up = GateUpLinear(
            config.hidden_size,
            intermediate_size,
            names=tuple(f"{name}.{part}" for part in gate_up_names),
            has_bias=has_bias,
            activation=config.form.activation,
            axis=axis,
            kernels=kernels,
        )
        self.down = RowParallelLinear(
            intermediate_size,
            config.hidden_size,
            span=feature_spans(intermediate_size, axis)[axis.rank],
            name=f"{name}.{down_name}",
            has_bias=has_bias,
            axis=axis,
            kernels=kernels,
        )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.down(self.gate_up(x_TD))
        return y_TD

    def parts(self, norm: RmsNorm) -> MlpParts | None:
        """All of this after `norm`, for `Kernels.fuse_mlp`.

        None where the gate goes through another function than silu.
        """
        if self.gate_up.activation != "silu":
            return None
        assert self.gate_up.packed is not None, "weights are not loaded"
        assert self.down.packed is not None, "weights are not loaded"
        return MlpParts(
            norm_D=norm.weight_D,
            norm_eps=norm.eps,
            gate_up=self.gate_up.packed,
            down=self.down.packed,
        )
