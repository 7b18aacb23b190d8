"""The loss figures of the KV precision benchmark are those of their definitions."""

import math

import pytest
import torch

from benchmarks.logit_loss import LogitLoss, logit_loss


def test_equal_logits_lose_nothing() -> None:
    logits = torch.randn(300, 20, generator=torch.Generator().manual_seed(1))
    assert logit_loss(logits, logits.clone()) == LogitLoss(
        num_positions=300,
        max_difference=0,
        mean_difference=0,
        max_kl=0,
        mean_kl=0,
        greedy_share=1,
    )


def test_the_figures_are_those_of_the_definition() -> None:
    """Half and half against three quarters and a quarter, at one of two positions."""
    reference = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    logits = torch.tensor([[math.log(3), 0.0], [1.0, 0.0]])
    loss = logit_loss(reference, logits)
    kl = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert (loss.max_kl, loss.mean_kl) == pytest.approx((kl, kl / 2))
    assert (loss.max_difference, loss.mean_difference) == pytest.approx(
        (math.log(3), math.log(3) / 4)
    )
    assert loss.greedy_share == 1
    other = torch.tensor([[0.0, 0.1], [1.0, 2.0]])
    assert logit_loss(reference, other).greedy_share == 0
