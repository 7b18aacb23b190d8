"""One layer of a decoder: attention and feed-forward with the norms that its family puts around.

Shape suffixes: T tokens of this step, D model dim, A one a rotated pair, P blocks in the pool,
J key then value, G KV heads, C slots in a block.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import nn

from engine.checkpoint.config import ModelConfig
from engine.kernels.interface import FusedAttention, FusedMlp, Kernels
from engine.kv_cache.batch import StepBatch
from engine.layers.attention import Attention
from engine.layers.latent_attention import LatentAttention
from engine.layers.mlp import Mlp
from engine.layers.moe import MoeMlp
from engine.layers.norm import RmsNorm
from engine.parallel.axes import ParallelAxes
from engine.parallel.expert_placement import ExpertPlacement

Addition = Callable[[], torch.Tensor]
"""Waits for what half a layer adds to the residual; to be called once."""


class DecoderLayer(nn.Module):
    """Two halves, each of which begins to sum over the tensor axis what it adds to the residual.

    The sum is handed on, so that whoever needs it waits for it, and the next norm adds it. The
    collectives of a half are those of its block, then one all-reduce.
    """

    def __init__(
        self,
        config: ModelConfig,
        index: int,
        *,
        axes: ParallelAxes,
        kernels: Kernels,
        placement: ExpertPlacement | None = None,
    ) -> None:
        super().__init__()
        name = f"model.layers.{index}"
        form, window = config.form, config.windows[index]
        self.has_local_rope = window is not None and config.local_rope is not None
        self._residual_scale = form.residual_scale
        self._kernels = kernels
        self._tp = axes.tp

        def norm(tensor: str | None) -> RmsNorm | None:
            if tensor is None:
                return None
            return RmsNorm(config.hidden_size, config, name=f"{name}.{tensor}", kernels=kernels)

        self.norm_before_attention = norm(form.norms.before_attention)
        self.attention: Attention | LatentAttention
        if form.latent is not None:
            self.attention = LatentAttention(
                config,
                form.latent,
                name=f"{name}.self_attn",
                axis=axes.tp,
                sequence=axes.sp,
                kernels=kernels,
            )
        else:
            self.attention = Attention(
                config,
                name=f"{name}.self_attn",
                window=window,
                axis=axes.tp,
                sequence=axes.sp,
                kernels=kernels,
            )
        self.norm_after_attention = norm(form.norms.after_attention)
        self.norm_before_mlp = norm(form.norms.before_mlp)
        self.mlp: Mlp | MoeMlp
        if form.experts is not None and index in form.experts.layers:
            self.mlp = MoeMlp(
                config,
                form.experts,
                layer=name,
                axes=axes,
                kernels=kernels,
                placement=placement,
            )
        else:
            self.mlp = Mlp(
                config,
                name=f"{name}.mlp",
                intermediate_size=config.intermediate_size,
                has_bias=form.mlp_bias,
                gate_up_names=form.gate_up_names,
                axis=axes.tp,
                kernels=kernels,
            )
        self.norm_after_mlp = norm(form.norms.after_mlp)

    def attend(
        self,
        add: Addition | None,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> Addition:
        """The first half; `add` is what the layer before returned, None before the first layer.

        `residual_TD` is changed in place. Keys and values are in the pool afterwards.
        """
        added_TD = None if add is None else add()
        y_TD = self._attend(added_TD, residual_TD, cos_TA, sin_TA, kv_PJGCA, batch)
        return self._begin_addition(y_TD, self.norm_after_attention)

    def feed(self, add: Addition, residual_TD: torch.Tensor, batch: StepBatch) -> Addition:
        """The second half, after `attend`, whose result `add` is."""
        y_TD = self._feed(add(), residual_TD, batch)
        return self._begin_addition(y_TD, self.norm_after_mlp)

    @cached_property
    def fused_attention(self) -> FusedAttention | None:
        """Norm and attention in one call, if this layer's form and the kernels have it so."""
        norm, attention = self.norm_before_attention, self.attention
        if norm is None or isinstance(attention, LatentAttention):
            return None
        parts = attention.parts(norm)
        return None if parts is None else self._kernels.fuse_attention(parts)

    @cached_property
    def fused_mlp(self) -> FusedMlp | None:
        """Norm and feed-forward block in one call, if layer and kernels have it so."""
        norm, mlp = self.norm_before_mlp, self.mlp
        if norm is None or isinstance(mlp, MoeMlp):
            return None
        parts = mlp.parts(norm)
        return None if parts is None else self._kernels.fuse_mlp(parts)

    def halves(self) -> tuple[FusedAttention, FusedMlp] | None:
        """The whole layer as two calls; None where anything else stands between or around them."""
        attention, mlp = self.fused_attention, self.fused_mlp
        norms_after = (self.norm_after_attention, self.norm_after_mlp)
        is_whole = (
            self._tp.size == 1
            and norms_after == (None, None)
            and self._residual_scale == 1.0
            and not self.has_local_rope
        )
        if attention is None or mlp is None or not is_whole:
            return None
        return attention, mlp

    def _attend(
        self,
        added_TD: torch.Tensor | None,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
    ) -> torch.Tensor:
        fused = self.fused_attention
        if fused is not None:
            return fused(added_TD, residual_TD, cos_TA, sin_TA, kv_PJGCA)
        x_TD = add_and_norm(self.norm_before_attention, added_TD, residual_TD)
        attended_TD: torch.Tensor = self.attention(x_TD, cos_TA, sin_TA, kv_PJGCA, batch)
        return attended_TD

    def _feed(
        self, attended_TD: torch.Tensor, residual_TD: torch.Tensor, batch: StepBatch
    ) -> torch.Tensor:
        fused, mlp = self.fused_mlp, self.mlp
        if fused is not None:
            return fused(attended_TD, residual_TD)
        x_TD = add_and_norm(self.norm_before_mlp, attended_TD, residual_TD)
        if isinstance(mlp, MoeMlp):
            y_TD: torch.Tensor = mlp(x_TD, is_split=batch.split is not None)
        else:
            y_TD = mlp(x_TD)
        return y_TD

    def _begin_addition(self, y_TD: torch.Tensor, norm: RmsNorm | None) -> Addition:
        """Sum this rank's summand with the others'."""
        total = self._tp.begin_all_reduce(y_TD)

        def addition() -> torch.Tensor:
            sum_TD = total()
            if norm is not None:
                sum_TD = norm(sum_TD)
            if self._residual_scale != 1.0:
                sum_TD = sum_TD * self._residual_scale
            return sum_TD

        return addition


def add_and_norm(
    norm: RmsNorm | None, added_TD: torch.Tensor | None, residual_TD: torch.Tensor
) -> torch.Tensor:
    """residual_TD += added_TD in place; returns the norm of it, or without a norm itself."""
    if norm is None:
        return residual_TD if added_TD is None else residual_TD.add_(added_TD)
    if added_TD is None:
        normed_TD: torch.Tensor = norm(residual_TD)
        return normed_TD
    return norm.add(added_TD, residual_TD)
