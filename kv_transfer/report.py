"""What one handover did and when, for spans, metrics and the caller's report."""

from dataclasses import dataclass


@dataclass(slots=True)
class HandoverReport:
    """Filled in as the handover goes on. `_start_ns` and `_end_ns` are time.time_ns() marks."""

    data_plane: str = ""
    num_tokens: int = 0
    """Tokens whose KV crossed so far."""
    num_cached_tokens: int = 0
    """Tokens whose KV the receiver held already."""
    num_bytes: int = 0
    """Payload bytes that crossed so far."""
    num_handshakes: int = 0
    """1 when this handover had to make the receiver's acquaintance first."""
    reserve_start_ns: int = 0
    reserve_end_ns: int = 0
    transfer_start_ns: int = 0
    """First byte sent; 0 when none was."""
    transfer_end_ns: int = 0
    """Last byte acknowledged so far."""
    write_ns: int = 0
    """Time spent writing: the transfer without the pauses in which nothing was there to send."""
    commit_start_ns: int = 0
    commit_end_ns: int = 0
    outcome: str = "open"
    """committed, released, or the name of the error; "open" before the end."""

    @property
    def reserve_ns(self) -> int:
        return self.reserve_end_ns - self.reserve_start_ns

    @property
    def transfer_ns(self) -> int:
        return self.transfer_end_ns - self.transfer_start_ns

    @property
    def commit_ns(self) -> int:
        return self.commit_end_ns - self.commit_start_ns
