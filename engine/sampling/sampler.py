"""From logits to drawn tokens, for a whole batch, with one copy from device to host.

Shape suffixes: B rows, V vocabulary, N top log probabilities.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from engine.request import TokenLogprobs
from engine.sampling.adjust import adjust_logits
from engine.sampling.draw import argmax, draw
from engine.sampling.history import SamplerState
from engine.scheduling.limits import MAX_TOP_LOGPROBS
from engine.scheduling.step_plan import DrawnToken


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Whose next token a row of logits decides."""

    state: SamplerState
    position: int
    """Absolute index in its sequence of the token to be drawn."""
    num_output_tokens: int
    """Tokens of the answer before it."""


@dataclass(frozen=True, slots=True)
class _RawLogprobs:
    """Taken before anything changes the logits, for the rows that want them."""

    row_of: dict[int, int]
    """Row of the batch -> row here."""
    logprobs_BV: torch.Tensor
    top_BN: torch.Tensor
    top_ids_BN: torch.Tensor


@torch.inference_mode()
def sample(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> list[DrawnToken]:
    """Draw one token for each row; a row's token does not depend on the others.

    Args:
        logits_BV: float32; overwritten.
        rows: one for each row of logits; their states are told of the drawn tokens.
    """
    if all(row.state.is_plain for row in rows):
        return [DrawnToken(token_id, None) for token_id in argmax(logits_BV).tolist()]
    raw = _raw_logprobs(logits_BV, rows)
    states = [row.state for row in rows]
    adjust_logits(logits_BV, states, [row.num_output_tokens for row in rows])
    token_B = _choose(logits_BV, rows)
    drawn = _to_host(token_B, raw, rows)
    for state, token in zip(states, drawn, strict=True):
        state.add(token.token_id)
    return drawn


def _choose(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> torch.Tensor:
    drawing = [index for index, row in enumerate(rows) if not row.state.is_greedy]
    params = [rows[index].state.params for index in drawing]
    positions = [rows[index].position for index in drawing]
    if len(drawing) == len(rows):
        return draw(logits_BV, params, positions)
    token_B = argmax(logits_BV)
    if drawing:
        index_B = torch.tensor(drawing, device=logits_BV.device)
        token_B[index_B] = draw(logits_BV[index_B], params, positions)
    return token_B


def _raw_logprobs(logits_BV: torch.Tensor, rows: Sequence[SampleRow]) -> _RawLogprobs | None:
    wanted = [i for i, row in enumerate(rows) if row.state.params.num_top_logprobs is not None]
    if not wanted:
        return None
    logprobs_BV = logits_BV[torch.tensor(wanted, device=logits_BV.device)].log_softmax(-1)
    # Always the same number, so that ties fall alike whatever else is in the batch.
    top = logprobs_BV.topk(min(MAX_TOP_LOGPROBS, logits_BV.shape[1]), dim=-1)
    row_of = {row: index for index, row in enumerate(wanted)}
    return _RawLogprobs(row_of, logprobs_BV, top.values, top.indices)


def _to_host(
    token_B: torch.Tensor, raw: _RawLogprobs | None, rows: Sequence[SampleRow]
) -> list[DrawnToken]:
    """The one copy of the step: ids and logarithms packed into float64, which holds both."""
    if raw is None:
        return [DrawnToken(token_id, None) for token_id in token_B.tolist()]
    index_B = torch.tensor(list(raw.row_of), device=token_B.device)
    drawn_B1 = raw.logprobs_BV.gather(1, token_B[index_B][:, None])
    columns = [drawn_B1.double(), raw.top_BN.double(), raw.top_ids_BN.double()]
    packed = torch.cat([token_B.double(), torch.cat(columns, dim=1).flatten()]).tolist()
    num_rows, num_top = len(rows), raw.top_BN.shape[1]
    width = 1 + 2 * num_top
    drawn: list[DrawnToken] = []
    for row, sample_row in enumerate(rows):
        logprobs = None
        if row in raw.row_of:
            start = num_rows + raw.row_of[row] * width
            values = packed[start + 1 : start + 1 + num_top]
            token_ids = packed[start + 1 + num_top : start + width]
            wanted = sample_row.state.params.num_top_logprobs or 0
            top = zip(map(int, token_ids[:wanted]), values[:wanted], strict=True)
            logprobs = TokenLogprobs(packed[start], tuple(top))
        drawn.append(DrawnToken(int(packed[row]), logprobs))
    return drawn
