"""Attention to a part of a context, and how parts become the whole.

Shape suffixes: T tokens of this step, H query heads, A head dim.
"""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class AttentionPart:
    """What queries found in some positions of their context; parts of others can be added.

    Softmax over a union is the mean of the parts' softmax results, weighted by the sums of their
    exponentials: nothing is approximate, and the order matters to the last bits alone.

    Source: Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"; Liu et al.
    2023, "Ring Attention", section 3.
    """

    o_THA: torch.Tensor
    """float32; 0 where a query sees nothing of the part."""
    log_sum_TH: torch.Tensor
    """float32: log of the sum of exp(score) over the part; -inf where nothing is seen."""

    def add(self, other: "AttentionPart") -> None:
        """Become the part of both's positions; they must have none in common."""
        self._scale_to(torch.logaddexp(self.log_sum_TH, other.log_sum_TH), other)

    def add_sinks(self, sinks_H: torch.Tensor) -> None:
        """Count each head's score for nothing, which only adds to the softmax' divisor."""
        self._scale_to(torch.logaddexp(self.log_sum_TH, sinks_H.float()), None)

    def _scale_to(self, log_sum_TH: torch.Tensor, other: "AttentionPart | None") -> None:
        base_TH = log_sum_TH.masked_fill(log_sum_TH == -torch.inf, 0)
        self.o_THA.mul_(torch.exp(self.log_sum_TH - base_TH).unsqueeze(2))
        if other is not None:
            weight_TH = torch.exp(other.log_sum_TH - base_TH)
            self.o_THA.addcmul_(other.o_THA, weight_TH.unsqueeze(2))
        self.log_sum_TH = log_sum_TH
