"""What collectives cost: seconds and bytes, counted as they happen and taken once a step."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrafficReport:
    """Collectives of one step, all axes together."""

    seconds: float = 0.0
    """That a rank spent in them: from call to return, waiting for slower ranks included. Of what
    travels while the rank computes only starting it and waiting for it."""
    num_bytes: int = 0
    """Bytes handed in or got back by this rank, whichever is more, of each call."""
    num_calls: int = 0


class Traffic:
    """Counters of one rank; used by the thread that calls the collectives."""

    __slots__ = ("_num_bytes", "_num_calls", "_seconds")

    def __init__(self) -> None:
        self._seconds = 0.0
        self._num_bytes = 0
        self._num_calls = 0

    def add(self, seconds: float, num_bytes: int) -> None:
        self._seconds += seconds
        self._num_bytes += num_bytes
        self._num_calls += 1

    def add_wait(self, seconds: float) -> None:
        """For the end of a call that was counted when it began."""
        self._seconds += seconds

    def take(self) -> TrafficReport:
        """What came together since the last call, and start from zero."""
        report = TrafficReport(self._seconds, self._num_bytes, self._num_calls)
        self._seconds, self._num_bytes, self._num_calls = 0.0, 0, 0
        return report
