"""Kernels in plain torch: the reference, the CUDA path and the CPU path without native code.

Shape suffixes: T tokens of this step, D model dim, F output features, H query heads, G KV heads,
A head dim, P blocks in the pool, J key then value, C slots in a block.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from engine.kernels.attention_part import AttentionPart
from engine.kernels.interface import (
    AttentionParts,
    FusedAttention,
    FusedLayers,
    FusedMlp,
    HeadShape,
    MlpParts,
    PackedLinear,
)
from engine.kernels.torch_attention import (
    AttentionPlan,
    Scoring,
    attend_decode,
    attend_part,
    attend_prompt,
)
from engine.kv_cache.batch import KeySpans, StepBatch
from engine.kv_cache.scaled_rows import is_scaled, scaled_rows


class TorchKernels:
    """Rounds where transformers' eager code rounds: float32 results agree to the last bits."""

    def __init__(self, device: torch.device) -> None:
        self.name = f"torch-{device.type}"
        self._device = device
        self._num_threads = 0
        self._batch: StepBatch | None = None
        self._plan: AttentionPlan | None = None

    def begin_step(self, batch: StepBatch) -> None:
        self._batch = batch
        self._plan = None
        if self._device.type == "cpu" and batch.num_threads != self._num_threads:
            self._num_threads = batch.num_threads
            torch.set_num_threads(batch.num_threads)

    def fuse_attention(self, parts: AttentionParts) -> FusedAttention | None:
        return None

    def fuse_mlp(self, parts: MlpParts) -> FusedMlp | None:
        return None

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedMlp]]) -> FusedLayers | None:
        return None

    def pack_linear(self, weight_FD: torch.Tensor, bias_F: torch.Tensor | None) -> PackedLinear:
        return PackedLinear(weight_FD.shape[1], weight_FD.shape[0], weight_FD.detach(), bias_F)

    def linear(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        assert isinstance(packed.weight, torch.Tensor)
        return F.linear(x_TD, packed.weight, packed.bias_F)

    def linear_float32(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self.linear(x_TD, packed).float()

    def linear_silu_mul(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        return self.silu_mul(self.linear(x_TD, packed))

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        wide_TD = x_TD.float()
        scale_T1 = torch.rsqrt(wide_TD.pow(2).mean(-1, keepdim=True) + eps)
        if weight_D.dtype is x_TD.dtype:
            return weight_D * (wide_TD * scale_T1).to(x_TD.dtype)
        return (weight_D * (wide_TD * scale_T1)).to(x_TD.dtype)

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual_TD += x_TD
        return self.rms_norm(residual_TD, weight_D, eps)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

    def gelu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return F.gelu(gate_TF, approximate="tanh") * up_TF

    def clamped_swiglu(self, gate_up_TF: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        gate_TF = gate_TF.clamp(max=limit)
        up_TF = up_TF.clamp(min=-limit, max=limit)
        return (up_TF + 1) * (gate_TF * torch.sigmoid(gate_TF * alpha))

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
        sizes = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
        heads_TFA = qkv_TF.unflatten(-1, (sum(sizes), heads.head_dim))
        q_THA, k_TGA, v_TGA = heads_TFA.split(sizes, dim=1)
        if q_norm_A is not None:
            q_THA = self.rms_norm(q_THA, q_norm_A, norm_eps)
        if k_norm_A is not None:
            k_TGA = self.rms_norm(k_TGA, k_norm_A, norm_eps)
        spans = (heads.head_dim,)
        _store(kv_PJGCA, 0, self._rotate_first(k_TGA, cos_TA, sin_TA), batch, spans)
        _store(kv_PJGCA, 1, v_TGA, batch, spans)
        return self._rotate_first(q_THA, cos_TA, sin_TA)

    def rotate(
        self, x_THA: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor
    ) -> torch.Tensor:
        cos_T1A = cos_TA.to(x_THA.dtype).unsqueeze(1)
        sin_T1A = sin_TA.to(x_THA.dtype).unsqueeze(1)
        low_THA, high_THA = x_THA.chunk(2, dim=-1)
        return torch.cat(
            (low_THA * cos_T1A - high_THA * sin_T1A, high_THA * cos_T1A + low_THA * sin_T1A), dim=-1
        )

    def _rotate_first(
        self, x_THA: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor
    ) -> torch.Tensor:
        num_rotated = 2 * cos_TA.shape[1]
        if num_rotated == x_THA.shape[2]:
            return self.rotate(x_THA, cos_TA, sin_TA)
        turned_THA = self.rotate(x_THA[..., :num_rotated], cos_TA, sin_TA)
        return torch.cat((turned_THA, x_THA[..., num_rotated:]), dim=-1)

    def store_latent(
        self,
        latent_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        value_dim: int,
    ) -> None:
        spans = (value_dim, latent_TA.shape[1] - value_dim)
        _store(kv_PJGCA, 0, latent_TA.unsqueeze(1), batch, spans)

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
        plan = self._plan_for(batch, kv_PJGCA.shape[3])
        scoring = Scoring(scale, window, score_cap, sinks_H, value_dim)
        o_THA = q_THA.new_empty(*q_THA.shape[:2], value_dim or q_THA.shape[2])
        for prompt in plan.prompts:
            span = slice(prompt.start, prompt.end)
            o_THA[span] = attend_prompt(q_THA[span], kv_PJGCA, prompt, scoring)
        if plan.decode_rows_B is not None:
            rows = plan.decode_rows_B
            o_THA[rows] = attend_decode(q_THA[rows], kv_PJGCA, plan, scoring)
        return o_THA

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
        scoring = Scoring(scale, window, score_cap, None, value_dim)
        o_THA = torch.zeros(
            *(*q_THA.shape[:2], value_dim or q_THA.shape[2]),
            dtype=torch.float32,
            device=q_THA.device,
        )
        log_sum_TH = o_THA.new_full(q_THA.shape[:2], -torch.inf)
        start = 0
        for index, (num_queries, context_len) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            rows = slice(start, start + num_queries)
            start += num_queries
            queries = range(context_len - num_queries, context_len)
            found = attend_part(
                *(q_THA[rows], kv_PJGCA, batch.block_table_BW[index]),
                *(queries, keys.by_sequence[index], scoring),
            )
            if found is not None:
                o_THA[rows], log_sum_TH[rows] = found
        return AttentionPart(o_THA, log_sum_TH)

    def _plan_for(self, batch: StepBatch, block_size: int) -> AttentionPlan:
        if self._plan is None or self._batch is not batch:
            self._batch = batch
            self._plan = AttentionPlan.from_batch(batch, block_size)
        return self._plan


def _store(
    kv_PJGCA: torch.Tensor,
    part: int,
    x_TGA: torch.Tensor,
    batch: StepBatch,
    spans: Sequence[int],
) -> None:
    block_size = kv_PJGCA.shape[3]
    if is_scaled(kv_PJGCA):
        x_TGA = scaled_rows(x_TGA, spans, kv_PJGCA.dtype).view(kv_PJGCA.dtype)
    kv_PJGCA[batch.slot_T // block_size, part, :, batch.slot_T % block_size] = x_TGA
