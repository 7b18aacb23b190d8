"""The embedding and the LM head, with the vocabulary split over the tensor axis.

Shape suffixes: T tokens of this step, B sequences, D model dim, V vocabulary.
"""

import torch
import torch.nn.functional as F

from engine.kernels.interface import Kernels, PackedLinear
from engine.parallel.axes import AxisGroup
from engine.parallel.shard import ShardedModule, ShardSpec
from engine.parallel.spread import ALIGNMENT, spread


class VocabParallelEmbedding(ShardedModule):
    """Rows of the embedding for each token; each rank knows its range of the vocabulary."""

    weight_VD: torch.Tensor

    def __init__(self, vocab_size: int, hidden_size: int, *, name: str, axis: AxisGroup) -> None:
        self._span = _vocabulary_spans(vocab_size, axis)[axis.rank]
        super().__init__((_vocabulary_shard(name, vocab_size, hidden_size, self._span),))
        self._axis = axis
        self._declare("weight_VD", len(self._span), hidden_size)

    def forward(self, token_T: torch.Tensor) -> torch.Tensor:
        if self._axis.size == 1:
            return F.embedding(token_T, self.weight_VD)
        local_T = token_T - self._span.start
        is_here_T = (local_T >= 0) & (local_T < len(self._span))
        x_TD = F.embedding(local_T.where(is_here_T, 0), self.weight_VD)
        return self._axis.all_reduce(x_TD * is_here_T.unsqueeze(1))


class LmHead(ShardedModule):
    """logits_BV in float32 on every rank; weights of its own, or the embedding's where tied."""

    weight_VD: torch.Tensor | None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        name: str,
        tied_to: VocabParallelEmbedding | None,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        spans = _vocabulary_spans(vocab_size, axis)
        shard = _vocabulary_shard(name, vocab_size, hidden_size, spans[axis.rank])
        super().__init__((shard,) if tied_to is None else ())
        self._axis = axis
        self._sizes = [len(span) for span in spans]
        self._kernels = kernels
        self._tied = (tied_to,)  # in a tuple, so that it is not a submodule twice
        if tied_to is None:
            self._declare("weight_VD", len(spans[axis.rank]), hidden_size)
        self.packed: PackedLinear | None = None

    def pack(self, kernels: Kernels) -> None:
        tied_to = self._tied[0]
        weight_VD = self.weight_VD if tied_to is None else tied_to.weight_VD
        assert weight_VD is not None, "packed already"
        self.packed = kernels.pack_linear(weight_VD.detach(), None)
        if tied_to is None:
            self.weight_VD = None

    def forward(self, hidden_BD: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, "weights are not loaded"
        local_BV = self._kernels.linear_float32(hidden_BD, self.packed)
        return self._axis.all_gather(local_BV, -1, self._sizes)


def _vocabulary_spans(vocab_size: int, axis: AxisGroup) -> tuple[range, ...]:
    return spread(vocab_size, axis.size, alignment=ALIGNMENT, what="vocab_size")


def _vocabulary_shard(name: str, vocab_size: int, hidden_size: int, span: range) -> ShardSpec:
    return ShardSpec(
        tensor=f"{name}.weight",
        full_shape=(vocab_size, hidden_size),
        parameter="weight_VD",
        start=span.start,
        length=len(span),
    )
