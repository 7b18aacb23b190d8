"""Changes to single logits before a draw: bias, end tokens held back, penalties.

Sparse: only the logits that change are touched, by one gather and one scatter for the whole batch.
Shape suffixes: B rows, V vocabulary, N logits that change.
"""

from collections.abc import Sequence

import numpy as np
import torch

from engine.sampling.history import SamplerState


def adjust_logits(
    logits_BV: torch.Tensor, states: Sequence[SamplerState], num_output_tokens: Sequence[int]
) -> None:
    """Apply logit_bias, min_tokens and penalties in place, in this order.

    Args:
        logits_BV: float32; overwritten.
        states: one for each row.
        num_output_tokens: tokens of the answer before the one to be drawn.
    """
    _add_biases(logits_BV, states, num_output_tokens)
    _apply_penalties(logits_BV, states)


def _add_biases(
    logits_BV: torch.Tensor, states: Sequence[SamplerState], num_output_tokens: Sequence[int]
) -> None:
    rows: list[int] = []
    token_ids: list[int] = []
    biases: list[float] = []
    for row, state in enumerate(states):
        for token_id, bias in state.params.logit_bias:
            rows.append(row)
            token_ids.append(token_id)
            biases.append(bias)
        if num_output_tokens[row] < state.params.min_tokens:
            rows += [row] * len(state.end_token_ids)
            token_ids += state.end_token_ids
            biases += [-torch.inf] * len(state.end_token_ids)
    if rows:
        device = logits_BV.device
        index = (torch.tensor(rows, device=device), torch.tensor(token_ids, device=device))
        bias_N = torch.tensor(biases, dtype=logits_BV.dtype, device=device)
        logits_BV.index_put_(index, bias_N, accumulate=True)


def _apply_penalties(logits_BV: torch.Tensor, states: Sequence[SamplerState]) -> None:
    """Repetition over prompt and output, then frequency and presence over the output."""
    rows = [row for row, state in enumerate(states) if state.history is not None]
    if not rows:
        return
    vocab_size = logits_BV.shape[1]
    histories = [state.history for state in states if state.history is not None]
    lengths = [len(history.token_ids) for history in histories]
    flat = np.concatenate(
        [h.token_ids + row * vocab_size for row, h in zip(rows, histories, strict=True)]
    )
    params = [states[row].params for row in rows]
    per_token = np.stack(
        [
            np.concatenate([history.output_counts for history in histories]),
            np.repeat([p.repetition_penalty for p in params], lengths),
            np.repeat([p.frequency_penalty for p in params], lengths),
            np.repeat([p.presence_penalty for p in params], lengths),
        ]
    ).astype(np.float32)
    index_N = torch.from_numpy(flat).to(logits_BV.device)
    count_N, repetition_N, frequency_N, presence_N = torch.from_numpy(per_token).to(
        logits_BV.device
    )
    flat_logits = logits_BV.view(-1)
    x_N = flat_logits[index_N]
    x_N = torch.where(x_N > 0, x_N / repetition_N, x_N * repetition_N)
    x_N = x_N - frequency_N * count_N - presence_N * (count_N > 0)
    flat_logits[index_N] = x_N
