"""Mistral: Llama with a sliding window."""

from engine.models.causal_lm import CausalLM


class MistralForCausalLM(CausalLM):
    """All that differs is in ModelConfig: biases, tied embeddings, rope scaling and windows."""
