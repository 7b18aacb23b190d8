"""How the keys and values of a split step come to all its ranks, and which way is chosen."""

from enum import StrEnum

RING_MIN_CONTEXT_TOKENS = 4096
"""Before shorter contexts attention is over before a part has come. This and the next are measured
in docs/decisions/0014-keys-are-gathered-or-go-round.md."""
RING_MIN_PART_BYTES = 512 * 1024
"""Of one rank, in one layer: 4 ms over 1 Gbit/s, where smaller parts hide on their way no more than
what attention in parts costs."""


class KvExchange(StrEnum):
    """Either way every rank's pool has all of them when the layer is over."""

    GATHER = "gather"
    """One all-gather, then attention."""
    RING = "ring"
    """From rank to rank, while attention goes over what has come."""


def kv_exchange_for(transport: str, *, part_bytes: int, context_tokens: int) -> KvExchange:
    """Choose by size; the same on every rank.

    Args:
        transport: `Collectives.name` of the sequence axis. Through shared memory the cores that
            compute also copy: nothing travels meanwhile. A ring over NCCL was not measured.
        part_bytes: keys and values of the step in one layer, of one rank on average.
        context_tokens: what a token of the step attends to, on average.
    """
    is_large = part_bytes >= RING_MIN_PART_BYTES and context_tokens >= RING_MIN_CONTEXT_TOKENS
    return KvExchange.RING if transport == "gloo" and is_large else KvExchange.GATHER
