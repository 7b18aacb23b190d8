"""Which workers a sequence goes to: the policy interface and the least-loaded policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from protos.isthmus.v1.registry_pb2 import WorkerLoad, WorkerRecord


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that may be chosen, with its load as of this moment."""

    worker_id: str
    num_sequences: int
    """Decode: running and waiting. Prefill: prompts not yet answered with a first token."""
    num_queued_tokens: int
    """Prefill: prompt tokens not yet computed."""
    num_free_blocks: int
    turn: int
    """When it was chosen last; lower is longer ago."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Worker ids. `prefill` is None when the decode worker is to compute the prompt itself."""

    prefill: str | None
    decode: str


class Policy(Protocol):
    """Chooses workers for a sequence; `decode` is never empty, `prefill` may be."""

    def choose(
        self, prefill: Sequence[Candidate], decode: Sequence[Candidate], num_tokens: int
    ) -> Choice: ...


class LeastLoaded:
    """The prefill worker with the shortest queue, the decode worker with the fewest sequences.

    Equal ones take turns; a decode pool without a free block comes last.
    """

    def choose(
        self, prefill: Sequence[Candidate], decode: Sequence[Candidate], num_tokens: int
    ) -> Choice:
        del num_tokens
        first = min(
            prefill, key=lambda c: (c.num_queued_tokens, c.num_sequences, c.turn), default=None
        )
        second = min(decode, key=lambda c: (c.num_free_blocks == 0, c.num_sequences, c.turn))
        return Choice(first.worker_id if first else None, second.worker_id)


class LoadBook:
    """One worker's load: what it last reported, corrected by what this gateway did since.

    A report is a heartbeat old, so a burst would all go to one worker. What is there for certain is
    our own work; what the report held beyond our own work of that moment belongs to other gateways.
    """

    def __init__(self) -> None:
        self.num_sequences = 0
        self.num_tokens = 0
        self.turn = 0
        self._report = WorkerLoad()
        self._num_foreign_sequences = 0
        self._num_foreign_tokens = 0

    def add(self, num_tokens: int, turn: int) -> None:
        self.num_sequences += 1
        self.num_tokens += num_tokens
        self.turn = turn

    def remove(self, num_tokens: int) -> None:
        self.num_sequences -= 1
        self.num_tokens -= num_tokens
        assert self.num_sequences >= 0, "removed more than was added"

    def candidate(self, record: WorkerRecord) -> Candidate:
        """The load now, given the newest record."""
        if record.load != self._report:
            self._report = record.load
            reported = record.load.num_running + record.load.num_waiting
            self._num_foreign_sequences = max(0, reported - self.num_sequences)
            self._num_foreign_tokens = max(0, record.load.num_waiting_tokens - self.num_tokens)
        return Candidate(
            worker_id=record.worker_id,
            num_sequences=self.num_sequences + self._num_foreign_sequences,
            num_queued_tokens=self.num_tokens + self._num_foreign_tokens,
            num_free_blocks=record.load.num_free_blocks,
            turn=self.turn,
        )
