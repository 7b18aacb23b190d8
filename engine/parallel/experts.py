"""Experts on the ranks of an axis: tokens go to the experts their router chose, and come back.

Shape suffixes: T tokens of this step, D model dim, E experts (all), K experts chosen per token,
R routed tokens received by this rank, N pairs of a token and an expert, Q places of experts on all
ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from engine.parallel.axes import AxisGroup
from engine.parallel.expert_placement import ExpertPlacement


@dataclass(frozen=True, slots=True)
class Exchanged:
    """How the rows of a dispatch that travelled find back."""

    order_R: torch.Tensor
    """Which row, in the order of arrival, stands where among the rows by expert."""
    num_sent: Sequence[int]
    """Rows to each rank."""
    num_received: Sequence[int]


@dataclass(frozen=True, slots=True)
class Routed:
    """What `combine` needs of a `dispatch`; opaque to layers."""

    num_tokens: int
    tokens: slice
    """Those whose results this rank adds up."""
    row_TK: torch.Tensor
    """Of these tokens: where an expert's result stands among the rows; past them: elsewhere."""
    weight_TK: torch.Tensor
    """float32, of these tokens."""
    exchanged: Exchanged | None
    """None: no row left its rank."""


class ExpertExchange:
    """Brings tokens to experts and their results back. Every rank of the axis calls both.

    Ranks that hold the same tokens ("copies": the ranks of a tensor group) are neighbours on the
    axis. Where all of its ranks are copies nothing moves: each computes its experts for all tokens.
    Else each copy brings its share of the tokens to their experts by all-to-all, and the results
    back. Either way the results are summands that add up to y_TD over the copies.

    A token's sum runs over its experts in the order of its router, whatever else is in the batch.
    """

    def __init__(self, placement: ExpertPlacement, axis: AxisGroup) -> None:
        self._axis = axis
        self._placement = placement
        self._num_places = placement.num_places
        self._first = sum(self._num_places[: axis.rank])
        self._num_local = self._num_places[axis.rank]
        self._replicas_EX: torch.Tensor | None = None
        self._num_replicas_E: torch.Tensor | None = None

    def dispatch(
        self,
        x_TD: torch.Tensor,
        expert_TK: torch.Tensor,
        weight_TK: torch.Tensor,
        *,
        num_copies: int,
    ) -> tuple[torch.Tensor, tuple[int, ...], Routed]:
        """Return x_RD ordered by expert, how many rows each local expert has, and a handle.

        Waits for the device: the counts are Python ints, because each expert is a product of its
        own size.

        Args:
            x_TD: this rank's tokens; there may be none.
            expert_TK: ids in [0, E).
            weight_TK: float32.
            num_copies: ranks of the axis that hold the same tokens; all of the axis' ranks, or on
                every rank fewer.
        """
        if num_copies == self._axis.size:
            return self._masked(x_TD, self._places(expert_TK, 0), weight_TK)
        place_TK = self._places(expert_TK, self._axis.rank)
        return self._exchanged(x_TD, place_TK, weight_TK, num_copies)

    def combine(self, y_RD: torch.Tensor, handle: Routed) -> torch.Tensor:
        """This rank's summand of y_TD, in y's dtype: the caller adds over the copies.

        y_TD is for each token the weighted sum of its experts' results; `y_RD` may itself be a
        summand, of experts whose features are split.
        """
        exchanged = handle.exchanged
        if exchanged is not None:
            arrived_RD = torch.empty_like(y_RD)
            arrived_RD[exchanged.order_R] = y_RD
            y_RD = self._axis.all_to_all(arrived_RD, exchanged.num_received, exchanged.num_sent)
        padded_RD = torch.cat((y_RD, y_RD.new_zeros(1, y_RD.shape[1])))
        num_summed, num_chosen = handle.row_TK.shape
        sum_TD = y_RD.new_zeros((num_summed, y_RD.shape[1]), dtype=torch.float32)
        for index in range(num_chosen):
            part_TD = padded_RD[handle.row_TK[:, index]].float()
            sum_TD.addcmul_(part_TD, handle.weight_TK[:, index : index + 1])
        if num_summed == handle.num_tokens:
            return sum_TD.to(y_RD.dtype)
        y_TD = y_RD.new_zeros(handle.num_tokens, y_RD.shape[1])
        y_TD[handle.tokens] = sum_TD.to(y_RD.dtype)
        return y_TD

    def _masked(
        self, x_TD: torch.Tensor, place_TK: torch.Tensor, weight_TK: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[int, ...], Routed]:
        """The rows that this rank's experts have to compute of tokens that are here."""
        local_N = place_TK.flatten() - self._first
        is_here_N = (local_N >= 0) & (local_N < self._num_local)
        local_N = local_N.where(is_here_N, self._num_local)
        counts = torch.bincount(local_N, minlength=self._num_local + 1).tolist()[: self._num_local]
        num_routed = sum(counts)
        order_N = torch.argsort(local_N, stable=True)
        row_N = torch.full_like(order_N, num_routed)
        row_N[order_N[:num_routed]] = torch.arange(num_routed, device=x_TD.device)
        x_RD = x_TD[order_N[:num_routed] // place_TK.shape[1]]
        num_tokens, row_TK = len(x_TD), row_N.view(place_TK.shape)
        return (
            x_RD,
            tuple(counts),
            Routed(num_tokens, slice(0, num_tokens), row_TK, weight_TK, None),
        )

    def _exchanged(
        self, x_TD: torch.Tensor, place_TK: torch.Tensor, weight_TK: torch.Tensor, num_copies: int
    ) -> tuple[torch.Tensor, tuple[int, ...], Routed]:
        """Send this copy's share of the tokens away, receive what is for this rank's experts."""
        axis, num_tokens = self._axis, len(x_TD)
        copy = axis.rank % num_copies
        start, stop = (num_tokens * (copy + step) // num_copies for step in (0, 1))
        tokens = slice(start, stop)
        place_N = place_TK[tokens].flatten()
        order_N = torch.argsort(place_N, stable=True)
        row_N = torch.empty_like(order_N)
        row_N[order_N] = torch.arange(len(order_N), device=x_TD.device)
        count_Q = torch.bincount(place_N, minlength=sum(self._num_places))
        here_count_Q = axis.all_to_all(count_Q, self._num_places, [self._num_local] * axis.size)
        counts_of_rank = here_count_Q.view(axis.size, self._num_local).tolist()
        ends = [0, *accumulate(count_Q.tolist())]
        borders = [ends[index] for index in (0, *accumulate(self._num_places))]
        num_sent = [end - begin for begin, end in pairwise(borders)]
        num_received = [sum(counts) for counts in counts_of_rank]
        arrived_RD = axis.all_to_all(
            x_TD[start + order_N // place_TK.shape[1]], num_sent, num_received
        )
        local_Q = torch.arange(self._num_local, device=x_TD.device).repeat(axis.size)
        order_R = torch.argsort(local_Q.repeat_interleave(here_count_Q), stable=True)
        counts = tuple(sum(column) for column in zip(*counts_of_rank, strict=True))
        exchanged = Exchanged(order_R, num_sent, num_received)
        row_TK = row_N.view(stop - start, place_TK.shape[1])
        routed = Routed(num_tokens, tokens, row_TK, weight_TK[tokens], exchanged)
        return arrived_RD[order_R], counts, routed

    def _places(self, expert_TK: torch.Tensor, first_turn: int) -> torch.Tensor:
        """Where each token's experts stand, counted over all ranks; replicas take turns.

        Ranks that mask the same tokens must begin with the same turn.
        """
        if self._placement.is_plain:
            return expert_TK
        if self._replicas_EX is None or self._num_replicas_E is None:
            places = self._placement.places_of
            most = max(map(len, places))
            rows = [[each[index % len(each)] for index in range(most)] for each in places]
            device = expert_TK.device
            self._replicas_EX = torch.tensor(rows, device=device)
            self._num_replicas_E = torch.tensor([len(each) for each in places], device=device)
        token_T1 = torch.arange(len(expert_TK), device=expert_TK.device).unsqueeze(1)
        turn_TK = (token_T1 + first_turn) % self._num_replicas_E[expert_TK]
        return self._replicas_EX[expert_TK, turn_TK]
