"""Rotary embedding: the angles of a step's positions, with every scaling that Llama models use.

Inverse frequencies are computed with the operations, order and dtypes of transformers, so that
float32 angles are equal bit for bit.

Shape suffixes: T tokens of this step, A half of the head dim: one entry a rotated pair.
Source: transformers 5.23, modeling_rope_utils.py.
"""

import math

import torch

from engine.checkpoint.config import RopeConfig
from engine.errors import CheckpointError
from engine.kv_cache.batch import StepBatch


class RotaryEmbedding:
    """Computes cos_TA and sin_TA once a step.

    Angles are a function of the position and, for dynamic and longrope, of
    max(prompt length, position + 1): what transformers gives that prefills a prompt in one piece
    and then decodes. Chunks, preemption and migration do not change them.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._rope = rope
        self._head_dim = head_dim
        self._device = device
        inverse_A, self._attention_factor = _inverse_frequencies(rope, head_dim)
        self._inverse_A = inverse_A.to(device)
        self._long_A: torch.Tensor | None = None
        if rope.scaling == "longrope":
            self._long_A = _divided_frequencies(rope, head_dim, rope.long_factor).to(device)

    def tables(self, batch: StepBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos_TA and sin_TA, float32, scaled by the attention factor."""
        position_T1 = batch.position_T.unsqueeze(1)
        angle_TA = position_T1.float() * self._inverse_of(batch, position_T1)
        cos_TA, sin_TA = angle_TA.cos(), angle_TA.sin()
        if self._attention_factor != 1.0:
            cos_TA *= self._attention_factor
            sin_TA *= self._attention_factor
        return cos_TA, sin_TA

    def _inverse_of(self, batch: StepBatch, position_T1: torch.Tensor) -> torch.Tensor:
        """The inverse frequencies, [A] or, where they depend on the length, [T, A]."""
        if self._rope.scaling not in {"dynamic", "longrope"}:
            return self._inverse_A
        threshold = self._rope.original_max_context_tokens
        assert threshold is not None
        lengths = batch.context_lens if batch.prompt_lens is None else batch.prompt_lens
        if max(*lengths, *batch.context_lens) <= threshold:
            return self._inverse_A
        length_T1 = torch.repeat_interleave(
            torch.tensor(lengths, device=self._device),
            torch.tensor(batch.query_lens, device=self._device),
            output_size=sum(batch.query_lens),
        ).unsqueeze(1)
        length_T1 = torch.maximum(length_T1, position_T1 + 1)
        if self._long_A is not None:
            return torch.where(length_T1 > threshold, self._long_A, self._inverse_A)
        assert self._rope.factor is not None
        growth_T1 = self._rope.factor * length_T1.clamp(min=threshold) / threshold
        dim = self._head_dim
        base_T1 = self._rope.theta * (growth_T1 - (self._rope.factor - 1)) ** (dim / (dim - 2))
        exponent_A = _exponents(dim).to(self._device)
        return torch.where(length_T1 > threshold, 1.0 / base_T1**exponent_A, self._inverse_A)


def _exponents(dim: int) -> torch.Tensor:
    return torch.arange(0, dim, 2, dtype=torch.int64, device="cpu").float() / dim


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> tuple[torch.Tensor, float]:
    """Return [A] on the CPU, and the factor on cos and sin."""
    default_A = 1.0 / (rope.theta ** _exponents(head_dim))
    match rope.scaling:
        case "default" | "dynamic":
            return default_A, 1.0
        case "linear":
            return default_A / _required(rope.factor, "factor"), 1.0
        case "factors":
            return _divided_frequencies(rope, head_dim, rope.short_factor), 1.0
        case "longrope":
            short_A = _divided_frequencies(rope, head_dim, rope.short_factor)
            return short_A, _longrope_attention_factor(rope)
        case "llama3":
            return _llama3(rope, default_A), 1.0
        case "yarn":
            return _yarn(rope, head_dim), _yarn_attention_factor(rope)
        case "proportional":
            return _proportional(rope, head_dim), 1.0
        case _:
            raise CheckpointError(f"rope scaling {rope.scaling!r} is not supported")


def _required(value: float | None, name: str) -> float:
    if value is None:
        raise CheckpointError(f"rope scaling needs {name}")
    return value


def _divided_frequencies(
    rope: RopeConfig, head_dim: int, factors: tuple[float, ...]
) -> torch.Tensor:
    if len(factors) != head_dim // 2:
        raise CheckpointError(
            f"rope scaling has {len(factors)} factors, head_dim {head_dim} needs {head_dim // 2}"
        )
    factor_A = torch.tensor(factors, dtype=torch.float32, device="cpu")
    return 1.0 / (factor_A * rope.theta ** _exponents(head_dim))


def _longrope_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _required(rope.factor, "factor")
    original = _required(rope.original_max_context_tokens, "original_max_position_embeddings")
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(rope: RopeConfig, inverse_A: torch.Tensor) -> torch.Tensor:
    """Long waves are slowed by `factor`, short ones kept, those between interpolated."""
    factor = _required(rope.factor, "factor")
    low = _required(rope.low_freq_factor, "low_freq_factor")
    high = _required(rope.high_freq_factor, "high_freq_factor")
    original = _required(rope.original_max_context_tokens, "original_max_position_embeddings")
    wavelength_A = 2 * math.pi / inverse_A
    scaled_A = torch.where(wavelength_A > original / low, inverse_A / factor, inverse_A)
    smooth_A = (original / wavelength_A - low) / (high - low)
    smoothed_A = (1 - smooth_A) * scaled_A / factor + smooth_A * scaled_A
    is_between_A = (wavelength_A >= original / high) & (wavelength_A <= original / low)
    return torch.where(is_between_A, smoothed_A, scaled_A)


def _yarn(rope: RopeConfig, dim: int) -> torch.Tensor:
    """Source: Peng et al. 2023, "YaRN", with the corrections of transformers."""
    factor = _required(rope.factor, "factor")
    original = _required(rope.original_max_context_tokens, "original_max_position_embeddings")

    def dim_of(num_rotations: float) -> float:
        rotations = original / (num_rotations * 2 * math.pi)
        return (dim * math.log(rotations)) / (2 * math.log(rope.theta))

    low, high = dim_of(rope.beta_fast or 32), dim_of(rope.beta_slow or 1)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    steps_A = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    kept_A = 1 - torch.clamp((steps_A - low) / (high - low), 0, 1)
    wave_A = rope.theta ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    return (1.0 / (factor * wave_A)) * (1 - kept_A) + (1.0 / wave_A) * kept_A


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _required(rope.factor, "factor")

    def scale_of(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale_of(rope.mscale) / scale_of(rope.mscale_all_dim)
    return scale_of(1.0)


def _proportional(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """Only the first share of the pairs turns; the others keep angle 0."""
    num_rotated = int(rope.rotated_share * head_dim // 2)
    exponents = torch.arange(0, 2 * num_rotated, 2, dtype=torch.int64, device="cpu").float()
    inverse_A = torch.zeros(head_dim // 2, device="cpu")
    inverse_A[:num_rotated] = 1.0 / (rope.theta ** (exponents / head_dim))
    return inverse_A / (rope.factor or 1.0)
