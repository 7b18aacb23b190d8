"""The canonical layout of a KV block, as a value that both ends of a handover compare; no torch.

A block holds `block_size_tokens` tokens of one sequence for every layer of this rank:
[layer][part][kv head][slot][row], C-contiguous. The parts are key and value, or one latent vector
(multi-head latent attention). Heads stand outside the slots so that a range of heads is
contiguous, and all layers of a block stand together so that a whole block is one copy. A row is
one token's vector; at lower precision its float32 scales stand behind it, so that they go wherever
it goes: see `engine.kv_cache.scaled_rows`.
"""

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
SCALED_DTYPES = frozenset({"int8", "fp8"})
"""Rows of these end in their scales."""
SCALE_BYTES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class KvLayout:
    """Shape and dtype of every block of a pool."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size_tokens: int
    dtype: str
    """float32, bfloat16 or float16; int8 or fp8 (e4m3) with scales."""
    num_parts: int = 2
    """2: a key and a value for each token and head. 1: one latent vector that serves as both."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size_tokens"):
            if not 1 <= getattr(self, name) <= 1 << 20:
                raise ValueError(f"{name} must be in [1, 2^20], got {getattr(self, name)}")
        if self.num_parts not in (1, 2):
            raise ValueError(f"num_parts must be 1 or 2, got {self.num_parts}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {self.dtype!r}")
        if self.dtype in SCALED_DTYPES and self.head_dim % SCALE_BYTES:
            raise ValueError(
                f"KV in {self.dtype} needs heads of a multiple of {SCALE_BYTES} dims, since scales "
                f"stand behind them, got head_dim {self.head_dim}"
            )

    @property
    def row_length(self) -> int:
        """Elements of one token's row in one layer, part and head, scales included.

        A latent vector has two scales: its first part, which is the value, and the part that is
        rotated differ in size.
        """
        if self.dtype not in SCALED_DTYPES:
            return self.head_dim
        return self.head_dim + SCALE_BYTES * (2 if self.num_parts == 1 else 1)

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[L, J, G, C, A], where J is key then value, or the latent part alone; A is a row."""
        sizes = (self.num_layers, self.num_parts, self.num_kv_heads)
        return (*sizes, self.block_size_tokens, self.row_length)

    @property
    def bytes_per_cell(self) -> int:
        """Of one token in one layer of one head, all parts."""
        return self.num_parts * self.row_length * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_token(self) -> int:
        return self.num_layers * self.num_kv_heads * self.bytes_per_cell

    @property
    def block_bytes(self) -> int:
        return self.bytes_per_token * self.block_size_tokens

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens of one sequence."""
        return -(-num_tokens // self.block_size_tokens)
