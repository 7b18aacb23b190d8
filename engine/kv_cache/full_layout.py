"""The layout of a whole model's KV, from what its checkpoint says; no torch."""

from engine.checkpoint.config import ModelConfig
from engine.config import EngineConfig
from engine.kv_cache.layout import KvLayout


def full_kv_layout(model: ModelConfig, config: EngineConfig) -> KvLayout:
    """The pool of an engine with these settings if one rank held everything.

    Raises:
        ValueError: the model's heads do not go with `kv_dtype`.
    """
    dtype = model.dtype if config.dtype == "auto" else config.dtype
    return KvLayout(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        num_parts=model.num_kv_parts,
        block_size_tokens=config.block_size_tokens,
        dtype=dtype if config.kv_dtype == "auto" else config.kv_dtype,
    )
