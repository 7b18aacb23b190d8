"""Qwen3, dense: queries and keys are normalised head by head before they are rotated."""

from typing import ClassVar

from engine.models.causal_lm import CausalLM


class Qwen3ForCausalLM(CausalLM):
    """Qwen2's form without its biases, and with the norms."""

    has_qk_norm: ClassVar[bool] = True
