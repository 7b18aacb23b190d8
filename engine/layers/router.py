"""Chooses and weighs the experts of each token.

Shape suffixes: T tokens of this step, D model dim, E experts, K experts chosen per token, N groups
of experts.
"""

import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import ExpertsForm
from engine.kernels.interface import Kernels
from engine.parallel.linear import ColumnParallelLinear
from engine.parallel.shard import ShardedModule, ShardSpec

_TINY = 1e-20


class CorrectionBias(ShardedModule):
    """What is added to the scores when experts are chosen, and not when they are weighed."""

    bias_E: torch.Tensor

    def __init__(self, num_experts: int, *, name: str) -> None:
        shard = ShardSpec(
            tensor=f"{name}.e_score_correction_bias",
            full_shape=(num_experts,),
            parameter="bias_E",
            length=num_experts,
        )
        super().__init__((shard,))
        self._declare("bias_E", num_experts, dtype=torch.float32)


class Router(torch.nn.Module):
    """Replicated on every rank; scores are float32."""

    def __init__(
        self, config: ModelConfig, experts: ExpertsForm, *, block: str, kernels: Kernels
    ) -> None:
        super().__init__()
        form = experts.router
        name = f"{block}.{form.name}"
        self._form = form
        self._num_chosen = experts.num_chosen
        self._kernels = kernels
        self.gate = ColumnParallelLinear(
            config.hidden_size,
            experts.num_experts,
            name=name,
            has_bias=form.has_bias,
            kernels=kernels,
        )
        self.correction: CorrectionBias | None = None
        if form.has_correction_bias:
            self.correction = CorrectionBias(experts.num_experts, name=name)

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return expert_TK, best first, and weight_TK in float32."""
        form = self._form
        assert self.gate.packed is not None, "weights are not loaded"
        score_TE = self._kernels.linear_float32(x_TD, self.gate.packed)
        if form.scoring == "softmax":
            score_TE = score_TE.softmax(-1)
        elif form.scoring == "sigmoid":
            score_TE = score_TE.sigmoid()
        choice_TE = score_TE if self.correction is None else score_TE + self.correction.bias_E
        if form.num_groups > 1:
            choice_TE = self._without_other_groups(choice_TE)
        expert_TK = choice_TE.topk(self._num_chosen, dim=-1).indices
        weight_TK = score_TE.gather(1, expert_TK)
        if form.scoring == "softmax_of_chosen":
            weight_TK = weight_TK.softmax(-1)
        if form.is_normalized:
            weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + _TINY)
        return expert_TK, weight_TK * form.scale

    def _without_other_groups(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Experts outside the best groups are out of the question."""
        form = self._form
        choice_TNE = choice_TE.unflatten(1, (form.num_groups, -1))
        num_counted = 2 if form.group_score == "best_two" else 1
        group_TN = choice_TNE.topk(num_counted, dim=-1).values.sum(-1)
        best_TN = group_TN.topk(form.num_chosen_groups, dim=-1).indices
        is_out_TN = torch.ones_like(group_TN, dtype=torch.bool).scatter_(1, best_TN, value=False)
        kept_TE: torch.Tensor = choice_TNE.masked_fill(is_out_TN.unsqueeze(-1), -torch.inf).flatten(
            1
        )
        return kept_TE
