"""A mixture of experts in place of the feed-forward block.

Shape suffixes: T tokens of this step, D model dim, K experts chosen per token, R routed tokens
received by this rank.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import ExpertsForm
from engine.kernels.interface import Kernels
from engine.layers.mlp import Mlp
from engine.layers.router import Router
from engine.parallel.axes import AxisGroup, ParallelAxes
from engine.parallel.experts import ExpertDispatch, ReplicatedDispatch
from engine.parallel.linear import ColumnParallelLinear


class MoeMlp(nn.Module):
    """The weighted sum of the experts that a router chose, and of a shared one.

    Experts are split over `axes.ep`, which lies within a tensor group, and the features of each
    over `axes.expert_tp`. The collectives are those of the dispatch, then one all-reduce over the
    tensor axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: ExpertsForm,
        *,
        layer: str,
        axes: ParallelAxes,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        block = f"{layer}.{experts.block}"
        self._tp = axes.tp
        if axes.ep.size * axes.expert_tp.size != axes.tp.size:
            raise ValueError(
                f"ep={axes.ep.size} reaches beyond the {axes.tp.size} ranks of a tensor group, "
                "whose tokens are the same: experts across dp or sp ranks are not supported; use "
                "an ep that divides tp"
            )
        self._dispatch: ExpertDispatch = ReplicatedDispatch(experts.num_experts, axes.ep)
        self.router = Router(config, experts, block=block, kernels=kernels)
        first = self._dispatch.first
        *gate_up_names, down_name = experts.names
        self.experts = nn.ModuleList(
            Mlp(
                config,
                name=f"{block}.experts.{index}",
                intermediate_size=experts.intermediate_size,
                has_bias=experts.has_bias,
                gate_up_names=tuple(gate_up_names),
                down_name=down_name,
                axis=axes.expert_tp,
                kernels=kernels,
                is_reduced=False,
            )
            for index in range(first, first + self._dispatch.num_local)
        )
        self.shared: SharedExpert | None = None
        if experts.shared_size:
            self.shared = SharedExpert(config, experts, block=block, axis=axes.tp, kernels=kernels)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        expert_TK, weight_TK = self.router(x_TD)
        x_RD, counts, handle = self._dispatch.dispatch(x_TD, expert_TK, weight_TK)
        parts = [
            expert(part_RD)
            for expert, part_RD in zip(self.experts, x_RD.split(counts), strict=True)
            if len(part_RD)
        ]
        y_RD = torch.cat(parts) if parts else x_RD
        y_TD = self._dispatch.combine(y_RD, handle)
        if self.shared is not None:
            y_TD += self.shared(x_TD)
        return self._tp.all_reduce(y_TD)


class SharedExpert(nn.Module):
    """The expert that every token visits; its result is this rank's summand."""

    def __init__(
        self,
        config: ModelConfig,
        experts: ExpertsForm,
        *,
        block: str,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self.mlp = Mlp(
            config,
            name=f"{block}.{experts.shared_name}",
            intermediate_size=experts.shared_size,
            has_bias=config.form.mlp_bias,
            gate_up_names=config.form.gate_up_names,
            axis=axis,
            kernels=kernels,
            is_reduced=False,
        )
        self.gate: ColumnParallelLinear | None = None
        if experts.shared_gate is not None:
            self.gate = ColumnParallelLinear(
                config.hidden_size,
                1,
                name=f"{block}.{experts.shared_gate}",
                has_bias=False,
                kernels=kernels,
            )

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TD: torch.Tensor = self.mlp(x_TD)
        return y_TD if self.gate is None else torch.sigmoid(self.gate(x_TD)) * y_TD
