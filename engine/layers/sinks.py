"""Attention sinks: a learnt score for each head, which takes weight from every position (gpt-oss).

Shape suffixes: H query heads.
"""

import torch

from engine.parallel.axes import AxisGroup
from engine.parallel.shard import ShardedModule, ShardSpec


class Sinks(ShardedModule):
    """Heads are split over the axis as the queries are."""

    weight_H: torch.Tensor

    def __init__(self, num_heads: int, *, name: str, axis: AxisGroup) -> None:
        local = axis.shard_size(num_heads, "num_heads")
        super().__init__(
            (
                ShardSpec(
                    tensor=f"{name}.sinks",
                    full_shape=(num_heads,),
                    parameter="weight_H",
                    start=axis.rank * local,
                    length=local,
                ),
            )
        )
        self._declare("weight_H", local)
