"""Tensor-parallel linear layers over packed weights. Weights are stored [out, in], as torch does.

Shape suffixes (logical dims, never the shard layout): T tokens of this step, D input features,
F output features.
"""

import torch

from engine.checkpoint.form import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from engine.kernels.interface import HeadShape, Kernels, PackedLinear
from engine.parallel.axes import AxisGroup
from engine.parallel.heads import features_of, head_split
from engine.parallel.shard import ShardedModule, ShardSpec
from engine.parallel.spread import ALIGNMENT, spread


class ParallelLinear(ShardedModule):
    """One weight in the kernels' own form; the loaded weight is let go once it is packed."""

    weight_FD: torch.Tensor | None
    bias_F: torch.Tensor | None

    def __init__(
        self,
        local_in: int,
        local_out: int,
        shards: tuple[ShardSpec, ...],
        *,
        has_bias: bool,
        kernels: Kernels,
    ) -> None:
        super().__init__(shards)
        self._kernels = kernels
        self._declare("weight_FD", local_out, local_in)
        if has_bias:
            self._declare("bias_F", local_out)
        else:
            self.bias_F = None
        self.packed: PackedLinear | None = None

    def pack(self, kernels: Kernels) -> None:
        assert self.weight_FD is not None, "packed already"
        bias_F = None if self.bias_F is None else self.bias_F.detach()
        self.packed = kernels.pack_linear(self.weight_FD.detach(), bias_F)
        self.weight_FD = None

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, "weights are not loaded"
        return self._kernels.linear(x_TD, self.packed)


def row_shards(
    tensor: str,
    full_out: int,
    in_features: int,
    *,
    start: int,
    length: int,
    offset: int = 0,
    has_bias: bool,
) -> tuple[ShardSpec, ...]:
    """Output features [start, start + length) of a weight, and of its bias."""
    weight = ShardSpec(
        tensor=f"{tensor}.weight",
        full_shape=(full_out, in_features),
        parameter="weight_FD",
        start=start,
        length=length,
        offset=offset,
    )
    bias = ShardSpec(
        tensor=f"{tensor}.bias",
        full_shape=(full_out,),
        parameter="bias_F",
        start=start,
        length=length,
        offset=offset,
    )
    return (weight, bias) if has_bias else (weight,)


def _parts_of(names: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[tuple[str, int, int], ...]:
    """For each projection: its tensor, that tensor's rows, and the first row that is its own.

    A checkpoint has one tensor for each projection, or one that holds them all in this order.
    """
    if len(names) == 1:
        total = sum(sizes)
        return tuple((names[0], total, sum(sizes[:index])) for index in range(len(sizes)))
    return tuple((name, size, 0) for name, size in zip(names, sizes, strict=True))


def feature_spans(size: int, axis: AxisGroup) -> tuple[range, ...]:
    """Each rank's features of a feed-forward block."""
    return spread(size, axis.size, alignment=ALIGNMENT, what="intermediate_size")


class ColumnParallelLinear(ParallelLinear):
    """y_TF = x_TD @ weight_FD.T, with F split over an axis; `span` is this rank's, None all."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        span: range | None = None,
        name: str,
        has_bias: bool,
        kernels: Kernels,
    ) -> None:
        span = range(out_features) if span is None else span
        shards = row_shards(
            name,
            out_features,
            in_features,
            start=span.start,
            length=len(span),
            has_bias=has_bias,
        )
        super().__init__(in_features, len(span), shards, has_bias=has_bias, kernels=kernels)


class QkvParallelLinear(ParallelLinear):
    """Query, key and value projections in one product; heads split as `head_split` says."""

    def __init__(
        self,
        hidden_size: int,
        heads: HeadShape,
        *,
        names: tuple[str, ...],
        has_bias: bool,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        split = head_split(heads, axis.size, axis.rank)
        full_counts = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        own = (split.heads, split.kv_heads, split.kv_heads)
        spans = [features_of(part, heads.head_dim) for part in own]
        shards: list[ShardSpec] = []
        offset = 0
        parts = _parts_of(names, tuple(count * heads.head_dim for count in full_counts))
        for (name, num_rows, first), span in zip(parts, spans, strict=True):
            shards += row_shards(
                name,
                num_rows,
                hidden_size,
                start=first + span.start,
                length=len(span),
                offset=offset,
                has_bias=has_bias,
            )
            offset += len(span)
        super().__init__(hidden_size, offset, tuple(shards), has_bias=has_bias, kernels=kernels)
        self.split = split
        self.heads = HeadShape(len(split.heads), len(split.kv_heads), heads.head_dim)
        """Of this rank."""
        self.q_span, self.k_span, _ = spans
        """This rank's features of all queries and of all keys."""


class GateUpLinear(ParallelLinear):
    """activation(gate(x)) * up(x), both in one product; features split over the axis."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        names: tuple[str, ...],
        has_bias: bool,
        activation: Activation,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        span = feature_spans(intermediate_size, axis)[axis.rank]
        shards: list[ShardSpec] = []
        parts = _parts_of(names, (intermediate_size, intermediate_size))
        for index, (name, num_rows, first) in enumerate(parts):
            shards += row_shards(
                name,
                num_rows,
                hidden_size,
                start=first + span.start,
                length=len(span),
                offset=index * len(span),
                has_bias=has_bias,
            )
        super().__init__(
            hidden_size, 2 * len(span), tuple(shards), has_bias=has_bias, kernels=kernels
        )
        self.activation = activation

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, "weights are not loaded"
        kernels = self._kernels
        match self.activation:
            case "silu":
                return kernels.linear_silu_mul(x_TD, self.packed)
            case "gelu_tanh":
                return kernels.gelu_mul(kernels.linear(x_TD, self.packed))
            case "clamped_swiglu":
                gate_up_TF = kernels.linear(x_TD, self.packed)
                return kernels.clamped_swiglu(gate_up_TF, SWIGLU_ALPHA, SWIGLU_LIMIT)


class RowParallelLinear(ParallelLinear):
    """This rank's summand of y_TF = x_TD @ weight_FD.T, with D split over the axis.

    `span` is this rank's D. Megatron-LM (Shoeybi et al., 2019), section 3. The bias is read and
    added on rank 0 only. The all-reduce is the caller's: what else there is to do decides when it
    waits for it.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        span: range,
        name: str,
        has_bias: bool,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        weight = ShardSpec(
            tensor=f"{name}.weight",
            full_shape=(out_features, in_features),
            parameter="weight_FD",
            dim=1,
            start=span.start,
            length=len(span),
        )
        bias = ShardSpec(
            tensor=f"{name}.bias",
            full_shape=(out_features,),
            parameter="bias_F",
            length=out_features,
        )
        has_bias = has_bias and axis.rank == 0
        shards = (weight, bias) if has_bias else (weight,)
        super().__init__(len(span), out_features, shards, has_bias=has_bias, kernels=kernels)
