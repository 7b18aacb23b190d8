"""The model families; `load_model` is the door."""

from engine.models.build import build, load_model, resolve_dtype
from engine.models.causal_lm import CausalLM, KvLayers

__all__ = ["CausalLM", "KvLayers", "build", "load_model", "resolve_dtype"]
