"""Rows of a pool at lower precision: each value in a byte, then a float32 scale for each span.

A value reads back as its byte, taken for an int8 or a float8 (e4m3), times the scale of its span.
A span is a head's vector, or one of the two parts of a latent vector. Its largest value becomes
127 or 448; others are rounded to the nearest, ties to even. A span of zeros, or of values so small
that the scale would be no normal number, reads back as zeros; one with an infinity or a NaN reads
back as NaN throughout, so that it is seen as it would be at full precision.

Shape suffixes: P blocks in the pool, J key then value, G KV heads, C slots in a block, A dims of a
vector, X bytes of a row, N spans.
"""

from collections.abc import Sequence

import torch

from engine.kv_cache.layout import SCALE_BYTES

LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""By the dtype that values are stored in."""
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


def is_scaled(kv_PJGCA: torch.Tensor) -> bool:
    """Whether the rows of a pool end in scales."""
    return kv_PJGCA.dtype in LARGEST


def values_of_row(kv_PJGCA: torch.Tensor) -> int:
    """Dims of a vector in this pool."""
    num_scales = (2 if kv_PJGCA.shape[1] == 1 else 1) if is_scaled(kv_PJGCA) else 0
    return kv_PJGCA.shape[4] - num_scales * SCALE_BYTES


def scaled_rows(x_A: torch.Tensor, spans: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Rows of `x_A`, of any leading dims, whose last dim is divided into `spans`.

    Args:
        x_A: of any float dtype.
        spans: how many dims go by one scale, for each scale.
        dtype: one of `LARGEST`.

    Returns:
        row_X, uint8, contiguous: the values' bytes, then the scales.
    """
    wide = [part.float() for part in x_A.split(list(spans), -1)]
    scales = [_scale(part, dtype) for part in wide]
    values_A = torch.cat(
        [_rounded(part, scale, dtype) for part, scale in zip(wide, scales, strict=True)], -1
    )
    scale_N = torch.cat(scales, -1)
    return torch.cat((values_A.view(torch.uint8), scale_N.view(torch.uint8)), -1)


def unscaled_rows(row_X: torch.Tensor, spans: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """What rows of a pool stand for: x_A in `dtype`, rounded once, contiguous.

    Args:
        row_X: rows as they are stored, in one of `LARGEST`, of any leading dims.
        spans: as in `scaled_rows`.
        dtype: of the result.
    """
    num_values = sum(spans)
    values_A = row_X[..., :num_values].split(list(spans), -1)
    scale_bytes = row_X[..., num_values:].view(torch.uint8).contiguous()
    scale_N = scale_bytes.view(torch.float32).split(1, -1)
    parts = [
        (part.float() * scale).to(dtype) for part, scale in zip(values_A, scale_N, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _scale(wide_A: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """scale_1 of a span: 0 where it is all but zero, NaN where it is not finite."""
    scale_1 = wide_A.abs().amax(-1, keepdim=True) / LARGEST[dtype]
    scale_1 = scale_1.masked_fill(scale_1 < _SMALLEST_SCALE, 0.0)
    return scale_1.masked_fill(~scale_1.isfinite(), torch.nan)


def _rounded(wide_A: torch.Tensor, scale_1: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    largest = LARGEST[dtype]
    values_A = torch.where(scale_1 > 0, wide_A * (1 / scale_1), 0.0).clamp(-largest, largest)
    return (values_A.round() if dtype is torch.int8 else values_A).to(dtype)
