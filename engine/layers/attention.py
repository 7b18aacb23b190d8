"""Self-attention over the paged KV cache.

Shape suffixes: T tokens of this step, D model dim, H query heads, A head dim (cos and sin: half of
it), P blocks in the pool, J key then value, G KV heads, C slots in a block.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import HeadShape, Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.norm import NormWeight
from engine.parallel.axes import AxisGroup
from engine.parallel.linear import QkvParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Projects, rotates, stores keys and values, attends: one all-reduce over the tensor axis."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        name: str,
        window: int | None,
        has_qk_norm: bool,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        self._kernels = kernels
        self._window = window
        self._scale = config.head_dim**-0.5
        self._norm_eps = config.rms_norm_eps
        self.qkv = QkvParallelLinear(
            config.hidden_size,
            HeadShape(config.num_heads, config.num_kv_heads, config.head_dim),
            names=(f"{name}.q_proj", f"{name}.k_proj", f"{name}.v_proj"),
            has_bias=config.qkv_bias,
            axis=axis,
            kernels=kernels,
        )
        self.output = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            name=f"{name}.o_proj",
            has_bias=config.output_bias,
            axis=axis,
            kernels=kernels,
        )
        self.q_norm = NormWeight(config.head_dim, name=f"{name}.q_norm") if has_qk_norm else None
        self.k_norm = NormWeight(config.head_dim, name=f"{name}.k_norm") if has_qk_norm else None

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        q_THA = self._kernels.rope_and_store(
            self.qkv(x_TD),
            self.qkv.heads,
            cos_TA,
            sin_TA,
            kv_PJGCA,
            batch,
            q_norm_A=None if self.q_norm is None else self.q_norm.weight_D,
            k_norm_A=None if self.k_norm is None else self.k_norm.weight_D,
            norm_eps=self._norm_eps,
        )
        o_THA = self._kernels.attention(
            q_THA, kv_PJGCA, batch, scale=self._scale, window=self._window
        )
        y_TD: torch.Tensor = self.output(o_THA.flatten(1))
        return y_TD
