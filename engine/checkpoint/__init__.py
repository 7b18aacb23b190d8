"""Where a model is, what it is, what its files hold; no torch, so that the gateway may ask."""

from engine.checkpoint.config import ModelConfig, RopeConfig
from engine.checkpoint.digest import model_digest
from engine.checkpoint.gguf_file import GgufFile
from engine.checkpoint.locate import default_cache_dir, locate_model
from engine.checkpoint.read import read_config

__all__ = [
    "GgufFile",
    "ModelConfig",
    "RopeConfig",
    "default_cache_dir",
    "locate_model",
    "model_digest",
    "read_config",
]
