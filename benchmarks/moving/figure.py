"""What was measured."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """One case one way."""

    way: str
    block_bytes: int
    num_blocks: int
    median_gb_per_s: float
    """What it does."""
    best_gb_per_s: float
    """Of the quickest run: what it could do if nothing disturbed it."""
    cpu_s_per_gb: float
    """Of both processes, over all runs."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Medians over the runs."""

    data_plane: str
    num_tokens: int
    prefill_ms: float
    """First step to first token."""
    exposed_ms: float
    """End of prefill to the moment decode may run."""
    first_token_ms: float
    """Arrival to first token, with the handover under way beside it."""
    alone_ms: float
    """The same on this engine when nothing is handed over."""
    num_runs: int

    @property
    def exposed_share(self) -> float:
        return self.exposed_ms / self.prefill_ms

    @property
    def first_token_cost(self) -> float:
        return self.first_token_ms / self.alone_ms - 1
