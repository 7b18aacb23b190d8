"""Attention over the paged cache in plain torch: what a step's layers share, and the products.

Shape suffixes: T tokens of this step, H query heads, G KV heads, A head dim (of a value where it
is narrower), P blocks in the pool, J key then value, C slots in a block, B sequences that decode,
W blocks per sequence, S context positions, R query heads of one KV head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from engine.kv_cache.batch import StepBatch
from engine.kv_cache.scaled_rows import LARGEST, unscaled_rows

_MAX_SCORES = 1 << 24
"""Scores held at once where they are computed one by one."""


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


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer attends: the arguments of `Kernels.attention`."""

    scale: float
    window: int | None
    score_cap: float | None
    sinks_H: torch.Tensor | None
    value_dim: int | None

    @property
    def is_plain(self) -> bool:
        """Torch's own attention computes it."""
        return self.score_cap is None and self.sinks_H is None


def attend_prompt(
    q_THA: torch.Tensor, kv_PJGCA: torch.Tensor, prompt: PromptSpan, scoring: Scoring
) -> torch.Tensor:
    """One sequence's chunk; o_THA."""
    kv_JGSA = kv_PJGCA[prompt.blocks_S].permute(1, 2, 0, 3, 4).flatten(2, 3)
    kv_JGSA = _readable(kv_JGSA[:, :, : prompt.context_len], q_THA, scoring)
    k_GSA, v_GSA = _key_and_value(kv_JGSA, scoring)
    if scoring.is_plain:
        o_1HTA = F.scaled_dot_product_attention(
            q_THA.transpose(0, 1).unsqueeze(0),
            k_GSA.unsqueeze(0),
            v_GSA.unsqueeze(0),
            attn_mask=_prompt_mask(prompt, scoring.window, q_THA.device),
            scale=scoring.scale,
            enable_gqa=True,
        )
        return o_1HTA[0].transpose(0, 1)
    seen_TS = _seen_by(prompt, scoring.window, q_THA.device)
    q_1GRTA = q_THA.unflatten(1, (k_GSA.shape[0], -1)).permute(1, 2, 0, 3).unsqueeze(0)
    num_rows = max(1, _MAX_SCORES // (q_THA.shape[1] * prompt.context_len))
    parts = [
        _attend_score_by_score(q_1GRtA, k_GSA.unsqueeze(0), v_GSA.unsqueeze(0), seen_tS, scoring)
        for q_1GRtA, seen_tS in zip(
            q_1GRTA.split(num_rows, 3), seen_TS.split(num_rows), strict=True
        )
    ]
    return torch.cat(parts, 3)[0].permute(2, 0, 1, 3).flatten(1, 2)


def attend_decode(
    q_BHA: torch.Tensor, kv_PJGCA: torch.Tensor, plan: AttentionPlan, scoring: Scoring
) -> torch.Tensor:
    """All sequences of one token in one call; the heads of a group stand where queries would."""
    assert plan.decode_table_BW is not None
    assert plan.decode_len_B is not None
    kv_BWJGCA = kv_PJGCA[plan.decode_table_BW]
    kv_JBGSA = _readable(kv_BWJGCA.permute(2, 0, 3, 1, 4, 5).flatten(3, 4), q_BHA, scoring)
    position_S = torch.arange(kv_JBGSA.shape[3], device=q_BHA.device)
    len_B1 = plan.decode_len_B.unsqueeze(1)
    seen_BS = position_S < len_B1
    if scoring.window is not None:
        seen_BS &= position_S >= len_B1 - scoring.window
    # Slots past the context may hold another sequence's NaN, which a mask alone would let through.
    kept_JBGSA = kv_JBGSA.masked_fill(~seen_BS[:, None, :, None], 0)
    k_BGSA, v_BGSA = _key_and_value(kept_JBGSA, scoring)
    q_BGRA = q_BHA.unflatten(1, (k_BGSA.shape[1], -1))
    if scoring.is_plain:
        o_BGRA = F.scaled_dot_product_attention(
            q_BGRA, k_BGSA, v_BGSA, attn_mask=seen_BS[:, None, None, :], scale=scoring.scale
        )
        return o_BGRA.flatten(1, 2)
    o_BGR1A = _attend_score_by_score(
        q_BGRA.unsqueeze(3), k_BGSA, v_BGSA, seen_BS[:, None, None, None, :], scoring
    )
    return o_BGR1A.squeeze(3).flatten(1, 2)


def attend_part(
    q_THA: torch.Tensor,
    kv_PJGCA: torch.Tensor,
    blocks_W: torch.Tensor,
    queries: range,
    keys: Sequence[range],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One sequence's chunk over some positions of its context, computed in float32.

    Args:
        q_THA: of the positions in `queries`.
        kv_PJGCA: the pool.
        blocks_W: block ids of the context.
        queries: positions.
        keys: positions, ascending.
        scoring: without sinks.

    Returns:
        o_THA and log_sum_TH as in `AttentionPart`, or None where no query sees any of the keys.
    """
    first = 0 if scoring.window is None else queries.start - scoring.window + 1
    spans = [range(max(span.start, first), min(span.stop, queries.stop)) for span in keys]
    spans = [span for span in spans if span]
    if not spans:
        return None
    device, block_size = q_THA.device, kv_PJGCA.shape[3]
    position_S = torch.cat([torch.arange(span.start, span.stop, device=device) for span in spans])
    kv_SJGA = kv_PJGCA[blocks_W[position_S // block_size], :, :, position_S % block_size]
    kv_JGSA = _readable(kv_SJGA.permute(1, 2, 0, 3), q_THA, scoring).float()
    k_GSA, v_GSA = _key_and_value(kv_JGSA, scoring)
    query_T = torch.arange(queries.start, queries.stop, device=device)
    num_rows = max(1, _MAX_SCORES // (q_THA.shape[1] * len(position_S)))
    parts: list[tuple[torch.Tensor, torch.Tensor]] = []
    for q_tHA, query_t in zip(q_THA.split(num_rows), query_T.split(num_rows), strict=True):
        seen_tS = position_S <= query_t.unsqueeze(1)
        if scoring.window is not None:
            seen_tS &= position_S > query_t.unsqueeze(1) - scoring.window
        q_GRtA = q_tHA.float().unflatten(1, (k_GSA.shape[0], -1)).permute(1, 2, 0, 3)
        score_GRtS = _scores(q_GRtA, k_GSA, scoring).masked_fill(~seen_tS, -torch.inf)
        log_sum_GRt = score_GRtS.logsumexp(-1)
        base_GRt = log_sum_GRt.masked_fill(log_sum_GRt == -torch.inf, 0)
        weight_GRtS = torch.exp(score_GRtS - base_GRt.unsqueeze(-1))
        o_GRtA = (weight_GRtS.flatten(1, 2) @ v_GSA).unflatten(1, weight_GRtS.shape[1:3])
        parts.append((o_GRtA.flatten(0, 1).transpose(0, 1), log_sum_GRt.flatten(0, 1).mT))
    o_THA, log_sum_TH = (torch.cat(each) for each in zip(*parts, strict=True))
    return o_THA, log_sum_TH


def _attend_score_by_score(
    q_BGRTA: torch.Tensor,
    k_BGSA: torch.Tensor,
    v_BGSA: torch.Tensor,
    seen: torch.Tensor,
    scoring: Scoring,
) -> torch.Tensor:
    """Softmax in float32 with cap and sinks; `seen` is true where a query sees a position."""
    shape = q_BGRTA.shape[2:4]
    score = _scores(q_BGRTA, k_BGSA, scoring).masked_fill(~seen, -torch.inf)
    if scoring.sinks_H is None:
        weight_BGRTS = score.softmax(-1)
    else:
        sink = scoring.sinks_H.float().view(1, score.shape[1], -1, 1, 1)
        sink = sink.expand(*score.shape[:-1], 1)
        weight_BGRTS = torch.cat((score, sink), -1).softmax(-1)[..., :-1]
    o_BGRTA: torch.Tensor = (weight_BGRTS.to(v_BGSA.dtype).flatten(2, 3) @ v_BGSA).unflatten(
        2, shape
    )
    return o_BGRTA


def _scores(q_GRTA: torch.Tensor, k_GSA: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """score_GRTS in float32, scaled and capped; other dims may stand before."""
    shape = q_GRTA.shape[-3:-1]
    score_GRTS: torch.Tensor = (q_GRTA.flatten(-3, -2) @ k_GSA.mT).unflatten(-2, shape).float()
    score_GRTS *= scoring.scale
    if scoring.score_cap is None:
        return score_GRTS
    return scoring.score_cap * torch.tanh(score_GRTS / scoring.score_cap)


def _readable(row_A: torch.Tensor, q_HA: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Gathered rows of the pool in the queries' dtype."""
    if row_A.dtype not in LARGEST:
        return row_A
    head_dim = q_HA.shape[-1]
    value_dim = scoring.value_dim
    spans = (head_dim,) if value_dim is None else (value_dim, head_dim - value_dim)
    return unscaled_rows(row_A, spans, q_HA.dtype)


def _key_and_value(kv_J: torch.Tensor, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """Both parts; a latent vector is the key, and its first dims are the value."""
    if scoring.value_dim is None:
        return kv_J[0], kv_J[1]
    return kv_J[0], kv_J[0][..., : scoring.value_dim]


def _prompt_mask(prompt: PromptSpan, window: int | None, device: torch.device) -> torch.Tensor:
    if window is None or window >= prompt.context_len:
        mask: torch.Tensor = causal_lower_right(prompt.end - prompt.start, prompt.context_len)
        return mask
    return _seen_by(prompt, window, device)


def _seen_by(prompt: PromptSpan, window: int | None, device: torch.device) -> torch.Tensor:
    """seen_TS: the context positions that each query of a chunk sees."""
    num_queries = prompt.end - prompt.start
    last_T1 = torch.arange(
        prompt.context_len - num_queries, prompt.context_len, device=device
    ).unsqueeze(1)
    position_S = torch.arange(prompt.context_len, device=device)
    seen_TS = position_S <= last_T1
    return seen_TS if window is None else seen_TS & (position_S > last_T1 - window)


def _index(rows: list[int], device: torch.device) -> torch.Tensor | slice:
    """Rows as a slice where they are one run, which costs no copy to the device."""
    if rows == list(range(rows[0], rows[-1] + 1)):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _take(x_B: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    return x_B[_index(list(rows), x_B.device)]
