"""What a model asks of the hardware. One implementation a device family; models know only this.

Shape suffixes: T tokens of this step, D model dim, F output features, H query heads, G KV heads,
A head dim, P blocks in the pool, L layers, J key then value, C slots in a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from engine.kernels.attention_part import AttentionPart
from engine.kv_cache.batch import KeySpans, StepBatch


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A weight in the form its kernels want; opaque to models."""

    in_features: int
    out_features: int
    weight: object
    bias_F: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class HeadShape:
    """How the rows of a fused projection split: H query heads, G key heads, G value heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionParts:
    """All of a layer from the residual to the attention's output; the arguments of `Kernels`."""

    norm_D: torch.Tensor
    norm_eps: float
    qkv: PackedLinear
    heads: HeadShape
    rotary_dim: int
    q_norm_A: torch.Tensor | None
    k_norm_A: torch.Tensor | None
    head_norm_eps: float
    scale: float
    window: int | None
    score_cap: float | None
    sinks_H: torch.Tensor | None
    output: PackedLinear


@dataclass(frozen=True, kw_only=True, slots=True)
class MlpParts:
    """All of a layer from the residual to the feed-forward block's output, gated with silu."""

    norm_D: torch.Tensor
    norm_eps: float
    gate_up: PackedLinear
    down: PackedLinear


class FusedAttention(Protocol):
    """add_rms_norm (rms_norm where nothing is added), linear, rope_and_store, attention, linear."""

    def __call__(
        self,
        added_TD: torch.Tensor | None,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
    ) -> torch.Tensor:
        """residual_TD += added_TD in place; returns y_TD, of the step that was begun."""


class FusedMlp(Protocol):
    """add_rms_norm (rms_norm where nothing is added), linear_silu_mul, linear."""

    def __call__(self, added_TD: torch.Tensor | None, residual_TD: torch.Tensor) -> torch.Tensor:
        """residual_TD += added_TD in place; returns y_TD, of the step that was begun."""


class FusedLayers(Protocol):
    """A `FusedAttention`, then a `FusedMlp`, for layer after layer."""

    def __call__(
        self,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_LPJGCA: Sequence[torch.Tensor],
        *,
        stops: Sequence[int] = (),
        on_stop: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """residual_TD is changed in place; returns what is to be added to it next.

        kv_LPJGCA are views of all layers' parts of one pool. After each number of layers in
        `stops`, which ascend, `on_stop` is called with it; the result is the same to the bit.
        """


class Kernels(Protocol):
    """Fused operations of one device. No call allocates more than its result; none synchronises.

    A pool may have rows at lower precision, with scales: its dtype says so (see
    `engine.kv_cache.scaled_rows`), and what is written to it is rounded.
    """

    name: str

    def begin_step(self, batch: StepBatch) -> None:
        """Called once before each forward pass: thread count, attention plan."""

    def pack_linear(self, weight_FD: torch.Tensor, bias_F: torch.Tensor | None) -> PackedLinear:
        """Take a loaded weight; the caller drops its own reference afterwards."""

    def linear(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """y_TF = x_TD @ weight_FD.T + bias_F, in x's dtype."""

    def linear_float32(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """The same with a float32 result: for the LM head."""

    def linear_silu_mul(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        """silu_mul(linear(x)), with the same bits, in one operation where the device has it."""

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        """Root-mean-square norm, computed in float32, rounded as transformers does it.

        A weight in x's dtype is multiplied after rounding, one in float32 before.
        """

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """residual_TD += x_TD in place, then the norm of the sum, as a new tensor."""

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """silu(first half) * second half of the last dim."""

    def gelu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        """gelu(first half) * second half of the last dim; gelu in its tanh form."""

    def clamped_swiglu(self, gate_up_TF: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        """Give gate * sigmoid(alpha * gate) * (up + 1), both clamped before (gpt-oss)."""

    def rope_and_store(
        self,
        qkv_TF: torch.Tensor,
        heads: HeadShape,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        q_norm_A: torch.Tensor | None = None,
        k_norm_A: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        """Norm (Qwen3), rotate (half-split form) and write K and V to `slot_T`; returns q_THA.

        cos_TA and sin_TA are float32 of each token's position, A / 2 wide, or R / 2 where only the
        first R dims of a head turn; kv_PJGCA is this layer's strided view of the pool.
        """

    def rotate(
        self, x_THA: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor
    ) -> torch.Tensor:
        """Rotate all dims of each head (half-split form), as a new tensor."""

    def store_latent(
        self,
        latent_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        value_dim: int,
    ) -> None:
        """Write each token's latent vector to `slot_T` of a pool with one part and one head.

        Its first value_dim dims are scaled apart from the others where the pool has scales.
        """

    def attention(
        self,
        q_THA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
        score_cap: float | None = None,
        sinks_H: torch.Tensor | None = None,
        value_dim: int | None = None,
    ) -> torch.Tensor:
        """Causal attention of each sequence's queries over its paged context; o_THA.

        Args:
            q_THA: rotated queries.
            kv_PJGCA: this layer's strided view of the pool, this step's tokens included.
            batch: the step that was begun.
            scale: on the products of queries and keys.
            window: a query at position p sees positions (p - window, p]; None sees all.
            score_cap: scaled scores s become cap * tanh(s / cap).
            sinks_H: each head's score for nothing, which only adds to the softmax' divisor.
            value_dim: for a pool with one part (J = 1): its vector is the key, and the first
                value_dim dims of it are the value; o_THA is as wide.
        """

    def attention_part(
        self,
        q_THA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        keys: KeySpans,
        *,
        scale: float,
        window: int | None,
        score_cap: float | None = None,
        value_dim: int | None = None,
    ) -> AttentionPart:
        """Attention to some positions alone; parts of all positions add up to `attention`.

        The pool is read at these positions only: others need not be written yet. Sinks are for
        `AttentionPart.add_sinks`.
        """

    def fuse_attention(self, parts: AttentionParts) -> FusedAttention | None:
        """The same operations with the same bits in one call; None where the device lacks it."""

    def fuse_mlp(self, parts: MlpParts) -> FusedMlp | None:
        """The same operations with the same bits in one call; None where the device lacks it."""

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedMlp]]) -> FusedLayers | None:
        """These calls, one after the other, in one; None where the device lacks it."""
