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


class CheckpointError(IsthmusError):
    """A model cannot be loaded as it is on disk; the text names the file and what is wrong."""
