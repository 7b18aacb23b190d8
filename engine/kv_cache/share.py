"""Which part of a model's KV one rank's pool holds."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KvShare:
    """Layers and KV heads of the whole model, in the pool's order. Ranks may share heads."""

    layers: tuple[int, ...]
    kv_heads: tuple[int, ...]
    data_shard: int = 0
    """Whose sequences: ranks of other data shards hold others."""
