"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from engine.models.causal_lm import CausalLM


class Qwen2ForCausalLM(CausalLM):
    """All that differs is in ModelConfig: biases, tied embeddings, rope scaling and windows."""
