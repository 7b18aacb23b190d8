"""Llama 2 and 3.x, and what shares their form (SmolLM, TinyLlama)."""

from engine.models.causal_lm import CausalLM


class LlamaForCausalLM(CausalLM):
    """All that differs is in ModelConfig: biases, tied embeddings, rope scaling and windows."""
