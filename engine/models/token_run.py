"""Runs of a step's packed tokens, which take turns in each layer.

Shape suffixes: T tokens of the step or of a run, D model dim, A one a rotated pair.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from engine.kv_cache.batch import StepBatch
from engine.models.decoder_layer import Addition

Tables = tuple[torch.Tensor, torch.Tensor]
"""cos_TA and sin_TA."""


@dataclass(slots=True)
class TokenRun:
    """Tokens on their way through the layers."""

    batch: StepBatch
    residual_TD: torch.Tensor
    tables: Tables
    local_tables: Tables
    add: Addition | None = None
    """What the layers so far still have to add to the residual; None before the first."""


def token_runs(
    batch: StepBatch, residual_TD: torch.Tensor, tables: Tables, local_tables: Tables
) -> Sequence[TokenRun]:
    """Cut the step into its `parts`; their residuals are views of the whole."""
    parts = batch.parts or (batch,)
    runs, start = [], 0
    for part, end in zip(parts, accumulate(len(part.token_T) for part in parts), strict=True):
        rows = slice(start, end)
        local = _rows_of(local_tables, rows)
        runs.append(TokenRun(part, residual_TD[rows], _rows_of(tables, rows), local))
        start = end
    assert start == len(residual_TD), f"parts of {start} tokens in a step of {len(residual_TD)}"
    return runs


def _rows_of(tables: Tables, rows: slice) -> Tables:
    cos_TA, sin_TA = tables
    return cos_TA[rows], sin_TA[rows]
