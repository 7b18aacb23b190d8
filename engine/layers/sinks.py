"""Attention sinks: a learnt score for each head, which takes weight from every position (gpt-oss).

Shape suffixes: H query heads.
"""

import torch

from engine.parallel.shard import ShardedModule, ShardSpec


class Sinks(ShardedModule):
    """Those of this rank's query heads, `heads`."""

    weight_H: torch.Tensor

    def __init__(self, num_heads: int, heads: range, *, name: str) -> None:
        super().__init__(
            (
                ShardSpec(
                    tensor=f"{name}.sinks",
                    full_shape=(num_heads,),
                    parameter="weight_H",
                    start=heads.start,
                    length=len(heads),
                ),
            )
        )
        self._declare("weight_H", len(heads))
