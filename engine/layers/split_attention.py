"""Attention where the tokens of a step may be split over ranks: keys and values come on the way.

Shape suffixes: T tokens of this step on this rank, H query heads, A head dim, P blocks in the pool,
J key then value, G KV heads, C slots in a block.
"""

import torch

from engine.kernels.interface import Kernels
from engine.kv_cache.batch import StepBatch
from engine.parallel.axes import AxisGroup
from engine.parallel.sequence import gather_kv, pass_kv_round


def attend(
    q_THA: torch.Tensor,
    kv_PJGCA: torch.Tensor,
    batch: StepBatch,
    sequence: AxisGroup,
    kernels: Kernels,
    *,
    scale: float,
    window: int | None,
    score_cap: float | None = None,
    sinks_H: torch.Tensor | None = None,
    value_dim: int | None = None,
) -> torch.Tensor:
    """`Kernels.attention`, once this rank has stored its tokens; the pool has all ranks' then.

    The collectives are those of `gather_kv` or of `pass_kv_round`, as `batch.split` says. Round a
    ring sums come in another order: results differ in the last bits from those after a gather.
    """
    if batch.split is None or batch.split.ring is None:
        gather_kv(kv_PJGCA, batch, sequence)
        return kernels.attention(
            *(q_THA, kv_PJGCA, batch),
            scale=scale,
            window=window,
            score_cap=score_cap,
            sinks_H=sinks_H,
            value_dim=value_dim,
        )
    parts = (
        kernels.attention_part(
            *(q_THA, kv_PJGCA, batch, keys),
            scale=scale,
            window=window,
            score_cap=score_cap,
            value_dim=value_dim,
        )
        for keys in pass_kv_round(kv_PJGCA, batch, sequence)
    )
    whole = next(parts)
    for part in parts:
        whole.add(part)
    if sinks_H is not None:
        whole.add_sinks(sinks_H)
    return whole.o_THA.to(q_THA.dtype)
