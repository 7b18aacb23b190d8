"""What one handover did and when, for spans, metrics and the caller's report."""

from dataclasses import dataclass, field

from protos.isthmus.v1 import prefill_pb2


@dataclass(slots=True)
class HandoverReport:
    """Filled in as the handover goes on. `_start_ns` and `_end_ns` are time.time_ns() marks."""

    data_plane: str = ""
    """The bytes' way; none when the receiver held all of the KV."""
    num_tokens: int = 0
    """Tokens whose KV crossed so far."""
    num_cached_tokens: int = 0
    """Tokens whose KV the receiver held already."""
    num_bytes: int = 0
    """Payload bytes that crossed so far."""
    retransfers: list[str] = field(default_factory=list)
    """Why something had to be written again, each time: corrupt, broken."""
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
    computed_ns: int = 0
    """The last KV was there to be sent; a prefill worker sets the end of prefill instead."""
    outcome: str = "open"
    """committed, released, or the name of the error; "open" before the end."""

    @property
    def reserve_span_ns(self) -> tuple[int, int]:
        """Start and end of the wait for blocks, a handshake included."""
        return self.reserve_start_ns, self.reserve_end_ns

    @property
    def transfer_span_ns(self) -> tuple[int, int]:
        """First byte sent to last byte acknowledged; empty when the receiver had it all."""
        if not self.transfer_start_ns:
            return self.reserve_end_ns, self.reserve_end_ns
        return self.transfer_start_ns, self.transfer_end_ns

    @property
    def commit_span_ns(self) -> tuple[int, int]:
        return self.commit_start_ns, self.commit_end_ns

    @property
    def reserve_ns(self) -> int:
        return _length(self.reserve_span_ns)

    @property
    def transfer_ns(self) -> int:
        return _length(self.transfer_span_ns)

    @property
    def commit_ns(self) -> int:
        return _length(self.commit_span_ns)

    @property
    def exposed_span_ns(self) -> tuple[int, int]:
        """What prefill did not hide: its end to the moment in which the sequence may decode."""
        start_ns = self.computed_ns or self.reserve_end_ns
        return start_ns, max(start_ns, self.commit_end_ns)

    @property
    def exposed_ns(self) -> int:
        return _length(self.exposed_span_ns)

    def to_pb(self) -> prefill_pb2.HandoverReport:
        return prefill_pb2.HandoverReport(
            num_bytes=self.num_bytes,
            num_tokens=self.num_tokens,
            num_cached_tokens=self.num_cached_tokens,
            reserve_ns=self.reserve_ns,
            transfer_ns=self.write_ns,
            commit_ns=self.commit_ns,
            exposed_ns=self.exposed_ns,
            data_plane=self.data_plane,
            retransfers=self.retransfers,
        )


def _length(span_ns: tuple[int, int]) -> int:
    return span_ns[1] - span_ns[0]
