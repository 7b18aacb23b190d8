"""Kernels in plain torch: the reference, the CUDA path and the CPU path without native code.

Shape suffixes: T tokens of this step, D model dim, F output features, H query heads, G KV heads,
A head dim, P blocks in the pool, J key then value, C slots in a block, B sequences that decode,
W blocks per sequence, S context positions, R query heads of one KV head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from engine.kernels.interface import HeadShape, PackedLinear
from engine.kv_cache.batch import StepBatch


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """One sequence that brings more than one token to this step."""

    start: int
    end: int
    context_len: int
    blocks_S: torch.Tensor
    """Block ids that hold the context."""


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What every layer of one step shares, so that no layer rebuilds it or asks the device."""

    prompts: tuple[PromptSpan, ...]
    decode_rows_B: torch.Tensor | slice | None
    """Where the sequences of one token stand on the packed axis; None if there are none."""
    decode_table_BW: torch.Tensor | None
    decode_len_B: torch.Tensor | None

    @classmethod
    def from_batch(cls, batch: StepBatch, block_size: int) -> "AttentionPlan":
        """Split a batch into prompts and decoding sequences; reads Python ints only."""
        prompts: list[PromptSpan] = []
        rows: list[int] = []
        members: list[int] = []
        start = 0
        for index, (num_queries, context_len) in enumerate(
            zip(batch.query_lens, batch.context_lens, strict=True)
        ):
            if num_queries == 1:
                rows.append(start)
                members.append(index)
            elif num_queries > 1:
                blocks_S = batch.block_table_BW[index, : -(-context_len // block_size)]
                prompts.append(PromptSpan(start, start + num_queries, context_len, blocks_S))
            start += num_queries
        if not rows:
            return cls(tuple(prompts), None, None, None)
        width = -(-max(batch.context_lens[member] for member in members) // block_size)
        table_BW = _take(batch.block_table_BW, members)[:, :width]
        len_B = _take(batch.context_len_B, members)
        return cls(tuple(prompts), _index(rows, batch.context_len_B.device), table_BW, len_B)


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
        return weight_D * (wide_TD * scale_T1).to(x_TD.dtype)

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual_TD += x_TD
        return self.rms_norm(residual_TD, weight_D, eps)

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        gate_TF, up_TF = gate_up_TF.chunk(2, dim=-1)
        return F.silu(gate_TF) * up_TF

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
        cos_T1A = cos_TA.to(qkv_TF.dtype).unsqueeze(1)
        sin_T1A = sin_TA.to(qkv_TF.dtype).unsqueeze(1)
        block_size = kv_PJGCA.shape[3]
        block_T = batch.slot_T // block_size
        offset_T = batch.slot_T % block_size
        kv_PJGCA[block_T, 0, :, offset_T] = _rotate(k_TGA, cos_T1A, sin_T1A)
        kv_PJGCA[block_T, 1, :, offset_T] = v_TGA
        return _rotate(q_THA, cos_T1A, sin_T1A)

    def attention(
        self,
        q_THA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
    ) -> torch.Tensor:
        plan = self._plan_for(batch, kv_PJGCA.shape[3])
        o_THA = torch.empty_like(q_THA)
        for prompt in plan.prompts:
            span = slice(prompt.start, prompt.end)
            o_THA[span] = _attend_prompt(q_THA[span], kv_PJGCA, prompt, scale, window)
        if plan.decode_rows_B is not None:
            q_BHA = q_THA[plan.decode_rows_B]
            o_THA[plan.decode_rows_B] = _attend_decode(q_BHA, kv_PJGCA, plan, scale, window)
        return o_THA

    def _plan_for(self, batch: StepBatch, block_size: int) -> AttentionPlan:
        if self._plan is None or self._batch is not batch:
            self._batch = batch
            self._plan = AttentionPlan.from_batch(batch, block_size)
        return self._plan


def _index(rows: list[int], device: torch.device) -> torch.Tensor | slice:
    """Rows as a slice where they are one run, which costs no copy to the device."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _take(x_B: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return x_B[_index(list(rows), x_B.device)]


def _rotate(x_THA: torch.Tensor, cos_T1A: torch.Tensor, sin_T1A: torch.Tensor) -> torch.Tensor:
    low_THA, high_THA = x_THA.chunk(2, dim=-1)
    return torch.cat(
        (low_THA * cos_T1A - high_THA * sin_T1A, high_THA * cos_T1A + low_THA * sin_T1A), dim=-1
    )


def _attend_prompt(
    q_THA: torch.Tensor,
    kv_PJGCA: torch.Tensor,
    prompt: PromptSpan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    kv_JGSA = kv_PJGCA[prompt.blocks_S].permute(1, 2, 0, 3, 4).flatten(2, 3)
    k_1GSA, v_1GSA = kv_JGSA[:, :, : prompt.context_len].unsqueeze(1)
    num_queries = prompt.end - prompt.start
    mask: torch.Tensor
    if window is None or window >= prompt.context_len:
        mask = causal_lower_right(num_queries, prompt.context_len)
    else:
        last_T1 = torch.arange(
            prompt.context_len - num_queries, prompt.context_len, device=q_THA.device
        ).unsqueeze(1)
        position_S = torch.arange(prompt.context_len, device=q_THA.device)
        mask = (position_S <= last_T1) & (position_S > last_T1 - window)
    o_1HTA = F.scaled_dot_product_attention(
        q_THA.transpose(0, 1).unsqueeze(0),
        k_1GSA,
        v_1GSA,
        attn_mask=mask,
        scale=scale,
        enable_gqa=True,
    )
    return o_1HTA[0].transpose(0, 1)


def _attend_decode(
    q_BHA: torch.Tensor,
    kv_PJGCA: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """All sequences of one token in one call; the heads of a group stand where queries would."""
    assert plan.decode_table_BW is not None
    assert plan.decode_len_B is not None
    kv_BWJGCA = kv_PJGCA[plan.decode_table_BW]
    kv_JBGSA = kv_BWJGCA.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
    position_S = torch.arange(kv_JBGSA.shape[3], device=q_BHA.device)
    len_B1 = plan.decode_len_B.unsqueeze(1)
    seen_BS = position_S < len_B1
    if window is not None:
        seen_BS &= position_S >= len_B1 - window
    # Slots past the context may hold another sequence's NaN, which a mask alone would let through.
    k_BGSA, v_BGSA = kv_JBGSA.masked_fill(~seen_BS[:, None, :, None], 0)
    q_BGRA = q_BHA.unflatten(1, (k_BGSA.shape[1], -1))
    o_BGRA = F.scaled_dot_product_attention(
        q_BGRA, k_BGSA, v_BGSA, attn_mask=seen_BS[:, None, None, :], scale=scale
    )
    return o_BGRA.flatten(1, 2)
