"""The blocks of the slow link's handovers: those of the demo model."""

from engine.kv_cache.layout import KvLayout

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size_tokens=16, dtype="bfloat16"
)
