"""A mixture of experts in place of the feed-forward block.

Shape suffixes: T tokens of this step, D model dim, K experts chosen per token, R routed tokens
received by this rank.
"""

import numpy as np
import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import ExpertsForm
from engine.kernels.interface import Kernels
from engine.layers.mlp import Mlp
from engine.layers.router import Router
from engine.parallel.axes import AxisGroup, ParallelAxes
from engine.parallel.expert_placement import ExpertPlacement
from engine.parallel.experts import ExpertExchange
from engine.parallel.linear import ColumnParallelLinear


class MoeMlp(nn.Module):
    """The weighted sum of the experts that a router chose, and of a shared one.

    Experts are spread over `axes.ep`, and the features of each over `axes.expert_tp`, which lies
    within a tensor group. The collectives are those of the exchange; with tokens here, also an
    all-reduce over the sequence axis where its ranks hold the same tokens and share the experts.
    """

    def __init__(
        self,
        config: ModelConfig,
        experts: ExpertsForm,
        *,
        layer: str,
        axes: ParallelAxes,
        kernels: Kernels,
        placement: ExpertPlacement | None = None,
    ) -> None:
        """Build what stands on this rank; by default the experts are spread evenly."""
        super().__init__()
        block = f"{layer}.{experts.block}"
        self._sp = axes.sp
        self._num_chosen = experts.num_chosen
        self._num_copies = axes.tp.size // axes.expert_tp.size
        """Ranks of the expert axis in one tensor group."""
        self._has_shared_sp = axes.sp.size > 1 and axes.ep.size > self._num_copies
        """Experts are spread over the ranks of the sequence axis, too."""
        placement = placement or ExpertPlacement.even(experts.num_experts, axes.ep.size)
        self._exchange = ExpertExchange(placement, axes.ep)
        self.load = ExpertLoad(
            placement.experts_of[axes.ep.rank],
            experts.num_experts,
            is_counted=axes.expert_tp.rank == 0,
        )
        self.router = Router(config, experts, block=block, kernels=kernels)
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
            )
            for index in self.load.experts
        )
        self.shared: SharedExpert | None = None
        if experts.shared_size:
            self.shared = SharedExpert(config, experts, block=block, axis=axes.tp, kernels=kernels)

    def forward(self, x_TD: torch.Tensor, *, is_split: bool) -> torch.Tensor:
        """This rank's summand over the tensor axis, of at least one token.

        `is_split` says that sequence ranks hold different ones.
        """
        is_alike = self._has_shared_sp and not is_split
        expert_TK, weight_TK = self.router(x_TD)
        num_copies = self._num_copies * (self._sp.size if is_alike else 1)
        y_TD = self._through_experts(x_TD, expert_TK, weight_TK, num_copies)
        if is_alike:
            y_TD = self._sp.all_reduce(y_TD)
        if self.shared is not None:
            y_TD += self.shared(x_TD)
        return y_TD

    def serve(self, like_TD: torch.Tensor) -> None:
        """Compute other ranks' tokens while there is none here; `like_TD` has the right type."""
        x_TD = like_TD.new_empty(0, like_TD.shape[1])
        expert_TK = torch.empty(0, self._num_chosen, dtype=torch.int64, device=x_TD.device)
        self._through_experts(x_TD, expert_TK, expert_TK.float(), self._num_copies)

    def _through_experts(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        num_copies: int,
    ) -> torch.Tensor:
        x_RD, counts, handle = self._exchange.dispatch(
            x_TD, expert_TK, weight_TK, num_copies=num_copies
        )
        self.load.add(counts)
        parts = [
            expert(part_RD)
            for expert, part_RD in zip(self.experts, x_RD.split(counts), strict=True)
            if len(part_RD)
        ]
        y_RD = torch.cat(parts) if parts else x_RD
        return self._exchange.combine(y_RD, handle)


class ExpertLoad:
    """How many tokens each expert of a layer has computed on this rank. Any thread may read it."""

    def __init__(self, experts: tuple[int, ...], num_experts: int, *, is_counted: bool) -> None:
        """Count for `experts`; where ranks share an expert by features one of them counts."""
        self.experts = experts
        self._num_experts = num_experts
        self._is_counted = is_counted
        self._num_tokens = np.zeros(len(experts), dtype=np.int64)

    def add(self, counts: tuple[int, ...]) -> None:
        """Tokens of one step for each expert here."""
        if self._is_counted:
            self._num_tokens += counts

    def reset(self) -> None:
        self._num_tokens[:] = 0

    def by_expert(self) -> list[int]:
        """Of all experts of the layer; zero for those that are not here."""
        found = [0] * self._num_experts
        for expert, count in zip(self.experts, self._num_tokens.tolist(), strict=True):
            found[expert] = count
        return found


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
