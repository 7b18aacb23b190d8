"""The tree of deliberate errors; `mesh/status.py` maps each to its gRPC status code.

IsthmusError
 +-- InvalidRequestError     can never succeed as written
 +-- UnknownRequestError     no such request or lease
 +-- DuplicateRequestError   the id is running already
 +-- CapacityError           no blocks or queue slots now
 +-- NotReadyError           loading or draining
 +-- PeerUnavailableError    a worker cannot be reached
 +-- KvLeaseLostError        prefilled KV expired or its holder died
 +-- LayoutMismatchError     prefill and decode disagree
 +-- KvCorruptionError       a checksum failed
 +-- DeadlineError           the time for the request is spent
 +-- EngineDeadError         the process must be replaced
 |    +-- RankGroupError           one rank's trouble ends the whole group of ranks
 |         +-- RankDeadError            a rank's process is gone
 |         +-- CollectiveTimeoutError   a rank did not come to a collective in time
 |         +-- CollectiveAbortedError   a rank called the group off
 +-- CheckpointError         a model cannot be loaded as it is on disk
"""


class IsthmusError(Exception):
    """Base of every deliberate error. `str(error)` is safe to show to a caller."""


class InvalidRequestError(IsthmusError):
    """The request can never succeed as written; the text names what to change."""


class UnknownRequestError(IsthmusError):
    """No request or lease has this id."""


class DuplicateRequestError(IsthmusError):
    """A request with this id is running already."""


class CapacityError(IsthmusError):
    """No KV blocks or queue slots now; the same request may succeed later."""


class NotReadyError(IsthmusError):
    """The worker is loading or draining; another one may serve the same call."""


class PeerUnavailableError(IsthmusError):
    """A worker cannot be reached; another one may serve the same call."""


class KvLeaseLostError(IsthmusError):
    """The prefilled KV is gone; the caller must start again from prefill."""


class LayoutMismatchError(IsthmusError):
    """Prefill and decode disagree on model, dtype, layout or protocol; the text shows both."""


class KvCorruptionError(IsthmusError):
    """Transferred KV failed its check; the caller must start again from prefill."""


class DeadlineError(IsthmusError):
    """The time given to the request is spent."""


class EngineDeadError(IsthmusError):
    """The engine thread died; the process must be replaced."""


class RankGroupError(EngineDeadError):
    """A group of ranks cannot go on; every process of it must be replaced.

    `rank` is the global rank that is to blame, None where that is not known; `operation` is what
    this rank was doing, such as "tp all_reduce".
    """

    def __init__(self, text: str, *, rank: int | None = None, operation: str = "") -> None:
        super().__init__(text)
        self.rank = rank
        self.operation = operation


class RankDeadError(RankGroupError):
    """The process of a rank is gone; the text names the rank and what this rank was doing."""


class CollectiveTimeoutError(RankGroupError):
    """A rank did not come to a collective in time: it is stopped, or far behind."""


class CollectiveAbortedError(RankGroupError):
    """A rank called the group off; the text has its reason."""


class CheckpointError(IsthmusError):
    """A model cannot be loaded as it is on disk; the text names the file and what is wrong."""
