"""Multi-head latent attention: the cache holds one latent vector a token, shared by all heads.

The keys and values that the latent vector stands for are never computed: their projections are
applied to the queries before attention and to the results after it, so that every head attends
with the cached vector itself as key, and its first part as value.

Shape suffixes: T tokens of this step, D model dim, H query heads, N dims of a head that are not
rotated, A dims of a rotated part (cos and sin: one a pair) or of key and query, K rank of the
latent vector, U dims of a value, P blocks in the pool, J = 1, G = 1, C slots in a block.

Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 and appendix C.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import LatentForm
from engine.kernels.interface import HeadShape, Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.norm import RmsNorm
from engine.layers.split_attention import attend
from engine.parallel.axes import AxisGroup
from engine.parallel.heads import features_of, head_split
from engine.parallel.linear import ColumnParallelLinear, RowParallelLinear
from engine.parallel.shard import ShardedModule, ShardSpec


class LatentProjections(ShardedModule):
    """From the latent vector to the keys and values of this rank's `heads`."""

    weight_FD: torch.Tensor | None
    key_HNK: torch.Tensor
    value_HKU: torch.Tensor

    def __init__(self, num_heads: int, heads: range, form: LatentForm, *, name: str) -> None:
        head_rows = form.nope_dim + form.value_dim
        shard = ShardSpec(
            tensor=f"{name}.weight",
            full_shape=(num_heads * head_rows, form.kv_rank),
            parameter="weight_FD",
            start=heads.start * head_rows,
            length=len(heads) * head_rows,
        )
        super().__init__((shard,))
        self._form = form
        self._declare("weight_FD", len(heads) * head_rows, form.kv_rank)

    def pack(self, kernels: Kernels) -> None:
        assert self.weight_FD is not None, "packed already"
        sizes = (self._form.nope_dim, self._form.value_dim)
        key_HNK, value_HUK = self.weight_FD.detach().unflatten(0, (-1, sum(sizes))).split(sizes, 1)
        self.key_HNK, self.value_HKU = key_HNK.contiguous(), value_HUK.mT.contiguous()
        self.weight_FD = None


class LatentAttention(nn.Module):
    """Projects, rotates, stores the latent vector, attends: a summand over the tensor axis.

    The latent vector is computed on every rank of the axis; heads are split. Where the batch is
    split, the collectives of `attend` over the sequence axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        form: LatentForm,
        *,
        name: str,
        axis: AxisGroup,
        sequence: AxisGroup,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self._sequence = sequence
        self._form = form
        self._kernels = kernels
        heads = head_split(HeadShape(config.num_heads, 1, 1), axis.size, axis.rank).heads
        self._num_local_heads = len(heads)
        query_dim = form.nope_dim + form.rope_dim
        self._scale = config.form.attention_scale or query_dim**-0.5

        def whole(inner: int, outer: int, part: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inner, outer, name=f"{name}.{part}", has_bias=form.has_bias, kernels=kernels
            )

        def queries(inner: int, part: str) -> ColumnParallelLinear:
            return ColumnParallelLinear(
                inner,
                config.num_heads * query_dim,
                span=features_of(heads, query_dim),
                name=f"{name}.{part}",
                has_bias=False,
                kernels=kernels,
            )

        def norm(size: int, part: str) -> RmsNorm:
            return RmsNorm(size, config, name=f"{name}.{part}", kernels=kernels, eps=form.norm_eps)

        self.query_norm: RmsNorm | None = None
        if form.query_rank is None:
            self.query = queries(config.hidden_size, "q_proj")
        else:
            self.query_down = whole(config.hidden_size, form.query_rank, "q_a_proj")
            self.query_norm = norm(form.query_rank, "q_a_layernorm")
            self.query = queries(form.query_rank, "q_b_proj")
        latent_dim = form.kv_rank + form.rope_dim
        self.latent = whole(config.hidden_size, latent_dim, "kv_a_proj_with_mqa")
        self.latent_norm = norm(form.kv_rank, "kv_a_layernorm")
        self.projections = LatentProjections(
            config.num_heads, heads, form, name=f"{name}.kv_b_proj"
        )
        self.output = RowParallelLinear(
            config.num_heads * form.value_dim,
            config.hidden_size,
            span=features_of(heads, form.value_dim),
            name=f"{name}.o_proj",
            has_bias=form.has_bias,
            axis=axis,
            kernels=kernels,
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        form, kernels = self._form, self._kernels
        latent_TK, rope_TA = self.latent(x_TD).split((form.kv_rank, form.rope_dim), 1)
        rope_TA = kernels.rotate(self._halves(rope_TA.unsqueeze(1)), cos_TA, sin_TA).squeeze(1)
        latent_TA = torch.cat((self.latent_norm(latent_TK), rope_TA), 1)
        kernels.store_latent(latent_TA, kv_PJGCA, batch, value_dim=form.kv_rank)
        o_THK = attend(
            *(self._queries(x_TD, cos_TA, sin_TA), kv_PJGCA, batch, self._sequence, kernels),
            scale=self._scale,
            window=None,
            value_dim=form.kv_rank,
        )
        o_HTU = torch.bmm(o_THK.transpose(0, 1), self.projections.value_HKU)
        y_TD: torch.Tensor = self.output(o_HTU.transpose(0, 1).flatten(1))
        return y_TD

    def _queries(
        self, x_TD: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor
    ) -> torch.Tensor:
        """q_THA in the space of the cached vector: latent part, then rotated part."""
        if self.query_norm is not None:
            x_TD = self.query_norm(self.query_down(x_TD))
        form = self._form
        query_THA = self.query(x_TD).unflatten(1, (self._num_local_heads, -1))
        nope_THN, rope_THA = query_THA.split((form.nope_dim, form.rope_dim), 2)
        latent_HTK = torch.bmm(nope_THN.transpose(0, 1), self.projections.key_HNK)
        rope_THA = self._kernels.rotate(self._halves(rope_THA), cos_TA, sin_TA)
        return torch.cat((latent_HTK.transpose(0, 1), rope_THA), 2)

    def _halves(self, x_THA: torch.Tensor) -> torch.Tensor:
        """Pairs (2i, 2i + 1) become (i, i + A / 2): in queries and keys alike."""
        if not self._form.is_interleaved:
            return x_THA
        halves_THA: torch.Tensor = x_THA.unflatten(2, (-1, 2)).mT.flatten(2)
        return halves_THA
