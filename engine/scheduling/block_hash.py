"""Content hashes of KV blocks: two processes that hold the same tokens agree on them."""

import struct
from collections.abc import Sequence
from hashlib import sha256

HASH_BYTES = 32


def block_hashes(token_ids: Sequence[int], block_size_tokens: int, *, salt: int = 0) -> list[bytes]:
    """Hash each full block together with everything before it; a trailing partial block has none.

    h_i = SHA-256(h_{i-1} || tokens of block i as little-endian uint32); h_{-1} is the salt in 32
    little-endian bytes. Nobody can make up a prompt whose blocks pass for another one's.

    Args:
        token_ids: of one sequence, from its start.
        block_size_tokens: tokens in a block.
        salt: what else decides the KV (`ModelConfig.rope_salt`); 0 for most models.
    """
    hashes: list[bytes] = []
    extend_block_hashes(hashes, token_ids, block_size_tokens, salt=salt)
    return hashes


def extend_block_hashes(
    hashes: list[bytes], token_ids: Sequence[int], block_size_tokens: int, *, salt: int = 0
) -> None:
    """Append the hashes of the full blocks that `hashes` lacks; it holds those of a prefix."""
    packer = struct.Struct(f"<{block_size_tokens}I")
    previous = hashes[-1] if hashes else salt.to_bytes(HASH_BYTES, "little")
    for index in range(len(hashes), len(token_ids) // block_size_tokens):
        start = index * block_size_tokens
        block = packer.pack(*token_ids[start : start + block_size_tokens])
        previous = sha256(previous + block).digest()
        hashes.append(previous)
