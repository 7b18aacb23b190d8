"""Checkpoint tensors, read by slice from safetensors or GGUF into a model's parameters."""

from engine.weights.loader import load
from engine.weights.source import WeightSource, open_weights

__all__ = ["WeightSource", "load", "open_weights"]
