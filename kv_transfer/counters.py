"""What happened so far, as frozen snapshots that a worker's metrics read."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, slots=True)
class SenderCounters:
    """Totals since start, and handovers that are open now."""

    num_open_handovers: int = 0
    num_bytes: Mapping[str, int] = field(default_factory=dict)
    """Payload bytes written, by data plane."""
    num_tokens: Mapping[str, int] = field(default_factory=dict)
    """Tokens of committed handovers: sent, or held by the receiver already."""
    write_s: Mapping[str, float] = field(default_factory=dict)
    """Time spent writing them, by data plane."""
    handovers: Mapping[str, int] = field(default_factory=dict)
    """Ended handovers, by outcome: committed, released, or the name of the error."""
    retransfers: Mapping[str, int] = field(default_factory=dict)
    """Writes that had to be repeated, by reason: corrupt, broken."""
    fallbacks: Mapping[str, int] = field(default_factory=dict)
    """Receivers that offered a faster data plane than the one that works, by reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceiverCounters:
    """Totals since start, and what is held now."""

    num_live_leases: int = 0
    num_quarantined_leases: int = 0
    """Revoked leases whose blocks a writer may still touch."""
    num_waiting_reserves: int = 0
    num_committed_tokens: int = 0
    """Tokens whose KV arrived from elsewhere."""
    num_committed_bytes: int = 0
    ended_leases: Mapping[str, int] = field(default_factory=dict)
    """By reason: committed, released, expired, aborted, refused."""
    dropped_connections: Mapping[str, int] = field(default_factory=dict)
    """Data connections closed from this side, by reason."""
