"""Self-attention over the paged KV cache.

Shape suffixes: T tokens of this step, D model dim, F features, H query heads, A head dim (cos and
sin: one a rotated pair), P blocks in the pool, J key then value, G KV heads, C slots in a block.
"""

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import AttentionParts, HeadShape, Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.norm import HeadsNorm, NormWeight, RmsNorm
from engine.layers.sinks import Sinks
from engine.layers.split_attention import attend
from engine.parallel.axes import AxisGroup
from engine.parallel.linear import QkvParallelLinear, RowParallelLinear


class Attention(nn.Module):
    """Projects, rotates, stores keys and values, attends: this rank's summand over the tensor axis.

    Where the batch is split, the collectives of `attend` over the sequence axis. Where queries and
    keys are normalised at full width, two all-reduces of a number a token over the tensor axis.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        name: str,
        window: int | None,
        axis: AxisGroup,
        sequence: AxisGroup,
        kernels: Kernels,
    ) -> None:
        super().__init__()
        form = config.form
        self._kernels = kernels
        self._sequence = sequence
        self._window = window
        self._scale = form.attention_scale or config.head_dim**-0.5
        self._score_cap = form.score_cap
        self._norm_eps = config.rms_norm_eps
        self._rotary_dim = config.rotary_dim
        self.qkv = QkvParallelLinear(
            config.hidden_size,
            HeadShape(config.num_heads, config.num_kv_heads, config.head_dim),
            names=tuple(f"{name}.{part}" for part in form.qkv_names),
            has_bias=form.qkv_bias,
            axis=axis,
            kernels=kernels,
        )
        self.output = RowParallelLinear(
            config.num_heads * config.head_dim,
            config.hidden_size,
            span=self.qkv.q_span,
            name=f"{name}.o_proj",
            has_bias=form.output_bias,
            axis=axis,
            kernels=kernels,
        )
        self.q_norm = self.k_norm = None
        if form.qk_norm == "head":
            self.q_norm = NormWeight(config.head_dim, name=f"{name}.q_norm", form=form.norm)
            self.k_norm = NormWeight(config.head_dim, name=f"{name}.k_norm", form=form.norm)
        self.full_norms: nn.ModuleList | None = None
        if form.qk_norm == "full":
            widths = (config.num_heads, config.num_kv_heads)
            spans = (self.qkv.q_span, self.qkv.k_span)
            copies = (0, self.qkv.split.copy)
            self.full_norms = nn.ModuleList(
                HeadsNorm(
                    num_heads * config.head_dim,
                    span,
                    config,
                    name=f"{name}.{part}_norm",
                    is_counted=copy == 0,
                    axis=axis,
                    kernels=kernels,
                )
                for part, num_heads, span, copy in zip("qk", widths, spans, copies, strict=True)
            )
        self.sinks = (
            Sinks(config.num_heads, self.qkv.split.heads, name=name) if form.has_sinks else None
        )

    def forward(
        self,
        x_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        qkv_TF = self.qkv(x_TD)
        if self.full_norms is not None:
            self._normalize(qkv_TF)
        q_THA = self._kernels.rope_and_store(
            qkv_TF,
            self.qkv.heads,
            cos_TA,
            sin_TA,
            kv_PJGCA,
            batch,
            q_norm_A=None if self.q_norm is None else self.q_norm.weight_D,
            k_norm_A=None if self.k_norm is None else self.k_norm.weight_D,
            norm_eps=self._norm_eps,
        )
        o_THA = attend(
            *(q_THA, kv_PJGCA, batch, self._sequence, self._kernels),
            scale=self._scale,
            window=self._window,
            score_cap=self._score_cap,
            sinks_H=None if self.sinks is None else self.sinks.weight_H,
        )
        y_TD: torch.Tensor = self.output(o_THA.flatten(1))
        return y_TD

    def parts(self, norm: RmsNorm) -> AttentionParts | None:
        """All of this after `norm`, for `Kernels.fuse_attention`.

        None where something else stands in between: a norm over all heads, or keys and values
        from other ranks.
        """
        if self.full_norms is not None or self._sequence.size > 1:
            return None
        assert self.qkv.packed is not None, "weights are not loaded"
        assert self.output.packed is not None, "weights are not loaded"
        return AttentionParts(
            norm_D=norm.weight_D,
            norm_eps=norm.eps,
            qkv=self.qkv.packed,
            heads=self.qkv.heads,
            rotary_dim=self._rotary_dim,
            q_norm_A=None if self.q_norm is None else self.q_norm.weight_D,
            k_norm_A=None if self.k_norm is None else self.k_norm.weight_D,
            head_norm_eps=self._norm_eps,
            scale=self._scale,
            window=self._window,
            score_cap=self._score_cap,
            sinks_H=None if self.sinks is None else self.sinks.weight_H,
            output=self.output.packed,
        )

    def _normalize(self, qkv_TF: torch.Tensor) -> None:
        assert self.full_norms is not None
        start = 0
        for norm, span in zip(self.full_norms, (self.qkv.q_span, self.qkv.k_span), strict=True):
            part_TF = qkv_TF[:, start : start + len(span)]
            part_TF.copy_(norm(part_TF))
            start += len(span)
