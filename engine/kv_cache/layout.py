"""The canonical layout of a KV block, as a value that both ends of a handover compare; no torch.

A block holds `block_size_tokens` tokens of one sequence for every layer of this rank:
[layer][key or value][kv head][slot][head dim], C-contiguous. Heads stand outside the slots so
that a range of heads is contiguous, and all layers of a block stand together so that a whole
block is one copy.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Shape and dtype of every block of a pool."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    dtype: str
    """float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size_tokens"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"{name} must be in [1, 2^20], got {getattr(self, name)}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[L, J, G, C, A], where J is key then value."""
        return (self.num_layers, 2, self.num_kv_heads, self.block_size_tokens, self.head_dim)

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * 2 * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size_tokens

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size_tokens)
