"""Tensor-parallel linear layers over packed weights. Weights are stored [out, in], as torch does.

Shape suffixes (logical dims, never the shard layout): T tokens of this step, D input features,
F output features.
"""

import torch

from engine.checkpoint.form import SWIGLU_ALPHA, SWIGLU_LIMIT, Activation
from engine.kernels.interface import HeadShape, Kernels, PackedLinear
from engine.parallel.axes import AxisGroup
from engine.parallel.shard import ShardedModule, ShardSpec


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


class ColumnParallelLinear(ParallelLinear):
    """y_TF = x_TD @ weight_FD.T, with F split over the axis; on an axis of one rank, all of it."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        has_bias: bool,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        local = axis.shard_size(out_features, "out_features")
        shards = row_shards(
            name,
            out_features,
            in_features,
            start=axis.rank * local,
            length=local,
            has_bias=has_bias,
        )
        super().__init__(in_features, local, shards, has_bias=has_bias, kernels=kernels)


class QkvParallelLinear(ParallelLinear):
    """Query, key and value projections in one product; heads split over the axis.

    Where the axis has more ranks than there are KV heads, each KV head stands on several ranks.
    """

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
        local_heads = axis.shard_size(heads.num_heads, "num_heads")
        if heads.num_kv_heads >= axis.size:
            local_kv_heads = axis.shard_size(heads.num_kv_heads, "num_kv_heads")
        else:
            AxisGroup(size=heads.num_kv_heads).shard_size(axis.size, "the axis size")
            local_kv_heads = 1
        first_kv_head = axis.rank * heads.num_kv_heads // axis.size
        self_heads = HeadShape(local_heads, local_kv_heads, heads.head_dim)
        spans = (
            (heads.num_heads, axis.rank * local_heads, local_heads),
            (heads.num_kv_heads, first_kv_head, local_kv_heads),
            (heads.num_kv_heads, first_kv_head, local_kv_heads),
        )
        shards: list[ShardSpec] = []
        offset = 0
        parts = _parts_of(names, tuple(full * heads.head_dim for full, _, _ in spans))
        for (name, num_rows, first), (_, start, length) in zip(parts, spans, strict=True):
            shards += row_shards(
                name,
                num_rows,
                hidden_size,
                start=first + start * heads.head_dim,
                length=length * heads.head_dim,
                offset=offset,
                has_bias=has_bias,
            )
            offset += length * heads.head_dim
        super().__init__(hidden_size, offset, tuple(shards), has_bias=has_bias, kernels=kernels)
        self.heads = self_heads
        """Of this rank."""
        self.q_span, self.k_span, _ = (
            (start * heads.head_dim, length * heads.head_dim) for _, start, length in spans
        )
        """This rank's features of all queries and of all keys: (start, length)."""


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
        local = axis.shard_size(intermediate_size, "intermediate_size")
        shards: list[ShardSpec] = []
        parts = _parts_of(names, (intermediate_size, intermediate_size))
        for index, (name, num_rows, first) in enumerate(parts):
            shards += row_shards(
                name,
                num_rows,
                hidden_size,
                start=first + axis.rank * local,
                length=local,
                offset=index * local,
                has_bias=has_bias,
            )
        super().__init__(hidden_size, 2 * local, tuple(shards), has_bias=has_bias, kernels=kernels)
        self._activation = activation

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert self.packed is not None, "weights are not loaded"
        kernels = self._kernels
        match self._activation:
            case "silu":
                return kernels.linear_silu_mul(x_TD, self.packed)
            case "gelu_tanh":
                return kernels.gelu_mul(kernels.linear(x_TD, self.packed))
            case "clamped_swiglu":
                gate_up_TF = kernels.linear(x_TD, self.packed)
                return kernels.clamped_swiglu(gate_up_TF, SWIGLU_ALPHA, SWIGLU_LIMIT)


class RowParallelLinear(ParallelLinear):
    """y_TF = x_TD @ weight_FD.T with D split over the axis; one all-reduce restores y_TF.

    Megatron-LM (Shoeybi et al., 2019), section 3. The bias is added on rank 0 only. Where
    `is_reduced` is false, y_TF is this rank's summand, and the caller reduces.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        has_bias: bool,
        axis: AxisGroup,
        kernels: Kernels,
        is_reduced: bool = True,
    ) -> None:
        local_in = axis.shard_size(in_features, "in_features")
        weight = ShardSpec(
            tensor=f"{name}.weight",
            full_shape=(out_features, in_features),
            parameter="weight_FD",
            dim=1,
            start=axis.rank * local_in,
            length=local_in,
        )
        bias = ShardSpec(
            tensor=f"{name}.bias",
            full_shape=(out_features,),
            parameter="bias_F",
            length=out_features,
        )
        shards = (weight, bias) if has_bias else (weight,)
        super().__init__(local_in, out_features, shards, has_bias=has_bias, kernels=kernels)
        self._axis = axis
        self._is_reduced = is_reduced

    def pack(self, kernels: Kernels) -> None:
        if self._axis.rank > 0:
            self.bias_F = None
        super().pack(kernels)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        y_TF = super().forward(x_TD)
        return self._axis.all_reduce(y_TF) if self._is_reduced else y_TF
