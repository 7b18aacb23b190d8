"""Experts split over an axis: tokens go to the experts that their router chose, and come back.

Shape suffixes: T tokens of this step, D model dim, E experts (all) / e experts on this rank,
K experts chosen per token, R routed tokens received by this rank.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from engine.parallel.axes import AxisGroup


@dataclass(frozen=True, slots=True)
class Routed:
    """What `combine` needs of a `dispatch`; opaque to layers."""

    row_TK: torch.Tensor
    """Where the result of a token's expert stands among the R rows; R where it is elsewhere."""
    weight_TK: torch.Tensor
    """float32."""


class ExpertDispatch(Protocol):
    """Brings tokens to experts and their results back. Every rank of the axis must call both."""

    first: int
    """This rank has experts [first, first + num_local)."""
    num_local: int

    def dispatch(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, ...], Routed]:
        """Return x_RD ordered by expert, how many rows each local expert has, and a handle.

        expert_TK are ids in [0, E), weight_TK is float32. Waits for the device: the counts are
        Python ints, because each expert is a product of its own size.
        """

    def combine(self, y_RD: torch.Tensor, handle: Routed) -> torch.Tensor:
        """This rank's summand of y_TD, in y's dtype: the caller adds over the tensor axis.

        y_TD is for each token the weighted sum of its experts' results; `y_RD` may itself be a
        summand, of experts whose features are split.
        """


class ReplicatedDispatch:
    """For an axis within one tensor group, whose ranks all hold the same tokens: nothing moves.

    A token's sum runs over its experts in the order of its router, whatever else is in the batch.
    """

    def __init__(self, num_experts: int, axis: AxisGroup) -> None:
        self.num_local = axis.shard_size(num_experts, "the number of experts")
        self.first = axis.rank * self.num_local

    def dispatch(
        self, x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, ...], Routed]:
        local_N = expert_TK.flatten() - self.first
        is_here_N = (local_N >= 0) & (local_N < self.num_local)
        local_N = local_N.where(is_here_N, self.num_local)
        counts = torch.bincount(local_N, minlength=self.num_local + 1).tolist()[: self.num_local]
        num_routed = sum(counts)
        order_N = torch.argsort(local_N, stable=True)
        row_N = torch.full_like(order_N, num_routed)
        row_N[order_N[:num_routed]] = torch.arange(num_routed, device=x_TD.device)
        x_RD = x_TD[order_N[:num_routed] // expert_TK.shape[1]]
        return x_RD, tuple(counts), Routed(row_N.view(expert_TK.shape), weight_TK)

    def combine(self, y_RD: torch.Tensor, handle: Routed) -> torch.Tensor:
        padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
        num_tokens, num_chosen = handle.row_TK.shape
        sum_TD = y_RD.new_zeros((num_tokens, y_RD.shape[1]), dtype=torch.float32)
        for index in range(num_chosen):
            part_TD = padded_RD[handle.row_TK[:, index]].float()
            sum_TD.addcmul_(part_TD, handle.weight_TK[:, index : index + 1])
        return sum_TD.to(y_RD.dtype)
