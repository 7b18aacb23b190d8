"""How far logits are from those of a reference."""

from dataclasses import dataclass

import torch

_ROWS = 128
"""At a time: a vocabulary is wide."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitLoss:
    """Over all positions of a text."""

    num_positions: int
    max_difference: float
    mean_difference: float
    """Of a logit, as for the largest one: absolute."""
    max_kl: float
    mean_kl: float
    """Divergence of the distribution from the reference's, in nats."""
    greedy_share: float
    """Positions at which the most likely token is the reference's."""


def logit_loss(reference: torch.Tensor, logits: torch.Tensor) -> LogitLoss:
    """Compare float32 logits of the same positions, the distributions as KL(reference || other)."""
    assert reference.shape == logits.shape, (reference.shape, logits.shape)
    differences, divergences, num_same = [], [], 0
    for ours, theirs in zip(reference.split(_ROWS), logits.split(_ROWS), strict=True):
        difference = (ours.double() - theirs.double()).abs()
        differences.append((difference.max().item(), difference.sum().item()))
        log_ours, log_theirs = ours.double().log_softmax(-1), theirs.double().log_softmax(-1)
        divergences.append((log_ours.exp() * (log_ours - log_theirs)).sum(-1))
        num_same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    kl = torch.cat(divergences)
    return LogitLoss(
        num_positions=len(reference),
        max_difference=max(most for most, _ in differences),
        mean_difference=sum(total for _, total in differences) / reference.numel(),
        max_kl=kl.max().item(),
        mean_kl=kl.mean().item(),
        greedy_share=num_same / len(reference),
    )
