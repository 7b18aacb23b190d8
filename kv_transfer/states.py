"""The life of a handover as two tables, one for each end; docs/handover.md shows them.

Both ends move through these rows only. A pair of state and event that has no row cannot happen:
to meet one is a bug here, whatever the peer has sent.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Generic, TypeVar


class LeaseState(StrEnum):
    """Of a lease on the receiver's blocks."""

    WAITING = "waiting"
    """In line for blocks; nobody knows the lease's number yet."""
    RESERVED = "reserved"
    """Its owner may write."""
    COMMITTING = "committing"
    """Its owner says that all is written: writers are fenced and the engine is being told."""
    COMMITTED = "committed"
    """The blocks belong to the sequence."""
    REVOKED = "revoked"
    """Quarantine: nobody may begin to write, but a write may still be under way."""
    FREED = "freed"
    """The blocks are back in the pool."""


class LeaseEvent(StrEnum):
    """What happens to a lease; the reason of its end as a metric label."""

    GRANTED = "granted"
    """The engine has taken blocks."""
    WITHDRAWN = "withdrawn"
    """Whoever asked has given up, or the engine has refused."""
    RENEWED = "renewed"
    """Asked for by the sender, in time."""
    COMMIT_ASKED = "commit_asked"
    """Asked for by the sender, in time."""
    COMMITTED = "committed"
    """The engine has taken the blocks over."""
    REFUSED = "refused"
    """The commit does not fit what was reserved, or bytes arrived damaged, or the engine or a
    rank did not take part."""
    RELEASED = "released"
    """Given back by the sender, which writes no more."""
    ABORTED = "aborted"
    """The decode side has given the request up."""
    EXPIRED = "expired"
    """Its time is over."""
    FENCED = "fenced"
    """No write can reach the blocks any more, and the engine has them back."""


class HandoverState(StrEnum):
    """Of a handover at its sender, from the receiver's grant on."""

    OPEN = "open"
    """Pushes may go out."""
    FAILED = "failed"
    """A push or the commit went wrong; all that is left is to close."""
    COMMITTING = "committing"
    """The receiver was told that all is there; its answer is under way."""
    COMMITTED = "committed"
    """The receiver has the sequence."""
    STOPPING = "stopping"
    """No write begins any more; those under way are waited for."""
    RELEASING = "releasing"
    """Nothing is written any more; the receiver is being told."""
    CLOSED = "closed"


class HandoverEvent(StrEnum):
    """What happens to a handover at its sender."""

    WRITE_FAILED = "write_failed"
    COMMIT_ASKED = "commit_asked"
    COMMIT_ANSWERED = "commit_answered"
    COMMIT_FAILED = "commit_failed"
    """Refused, or no answer: then the receiver may have the sequence or not."""
    CLOSE_ASKED = "close_asked"
    WRITES_ENDED = "writes_ended"
    RELEASE_ENDED = "release_ended"
    """Acknowledged, or no answer came in time: then the lease's end frees the blocks."""


State = TypeVar("State", bound=StrEnum)
Event = TypeVar("Event", bound=StrEnum)


class StateTable(Generic[State, Event]):
    """Every allowed (state, event, next state)."""

    def __init__(self, rows: Sequence[tuple[State, Event, State]]) -> None:
        self.rows = tuple(rows)
        self._next = {(state, event): after for state, event, after in rows}
        assert len(self._next) == len(self.rows), "two rows for one state and event"

    def after(self, state: State, event: Event, name: str) -> State:
        """The next state of `name`; the same one where the event is late or repeated."""
        after = self._next.get((state, event))
        assert after is not None, f"{name} cannot be {event} when it is {state}"
        return after

    def is_final(self, state: State) -> bool:
        return all(after is state for before, _, after in self.rows if before is state)


def _lease_rows() -> list[tuple[LeaseState, LeaseEvent, LeaseState]]:
    state, event = LeaseState, LeaseEvent
    return [
        (state.WAITING, event.GRANTED, state.RESERVED),
        (state.WAITING, event.WITHDRAWN, state.REVOKED),
        (state.WAITING, event.RELEASED, state.REVOKED),
        (state.WAITING, event.ABORTED, state.REVOKED),
        (state.RESERVED, event.RENEWED, state.RESERVED),
        (state.RESERVED, event.COMMIT_ASKED, state.COMMITTING),
        (state.RESERVED, event.RELEASED, state.REVOKED),
        (state.RESERVED, event.ABORTED, state.REVOKED),
        (state.RESERVED, event.EXPIRED, state.REVOKED),
        (state.RESERVED, event.REFUSED, state.REVOKED),
        (state.COMMITTING, event.COMMITTED, state.COMMITTED),
        (state.COMMITTING, event.REFUSED, state.REVOKED),
        (state.REVOKED, event.FENCED, state.FREED),
        # Late and repeated ones.
        (state.COMMITTING, event.RENEWED, state.COMMITTING),
        (state.COMMITTING, event.COMMIT_ASKED, state.COMMITTING),
        (state.COMMITTED, event.RENEWED, state.COMMITTED),
        (state.COMMITTED, event.COMMIT_ASKED, state.COMMITTED),
        (state.COMMITTED, event.RELEASED, state.COMMITTED),
        (state.COMMITTED, event.ABORTED, state.COMMITTED),
        (state.REVOKED, event.WITHDRAWN, state.REVOKED),
        (state.REVOKED, event.RENEWED, state.REVOKED),
        (state.REVOKED, event.COMMIT_ASKED, state.REVOKED),
        (state.REVOKED, event.RELEASED, state.REVOKED),
        (state.REVOKED, event.ABORTED, state.REVOKED),
        (state.REVOKED, event.REFUSED, state.REVOKED),
        (state.FREED, event.RENEWED, state.FREED),
        (state.FREED, event.COMMIT_ASKED, state.FREED),
        (state.FREED, event.RELEASED, state.FREED),
        (state.FREED, event.ABORTED, state.FREED),
        (state.FREED, event.REFUSED, state.FREED),
    ]


def _handover_rows() -> list[tuple[HandoverState, HandoverEvent, HandoverState]]:
    state, event = HandoverState, HandoverEvent
    closing = (state.STOPPING, state.RELEASING, state.CLOSED)
    return [
        (state.OPEN, event.WRITE_FAILED, state.FAILED),
        (state.OPEN, event.COMMIT_ASKED, state.COMMITTING),
        (state.OPEN, event.CLOSE_ASKED, state.STOPPING),
        (state.FAILED, event.WRITE_FAILED, state.FAILED),
        (state.FAILED, event.CLOSE_ASKED, state.STOPPING),
        (state.COMMITTING, event.COMMIT_ANSWERED, state.COMMITTED),
        (state.COMMITTING, event.COMMIT_FAILED, state.FAILED),
        (state.COMMITTING, event.CLOSE_ASKED, state.STOPPING),
        (state.COMMITTED, event.CLOSE_ASKED, state.CLOSED),
        (state.STOPPING, event.WRITES_ENDED, state.RELEASING),
        (state.RELEASING, event.RELEASE_ENDED, state.CLOSED),
        # Late ones: another task closes the handover.
        *((late, event.WRITE_FAILED, late) for late in closing),
        *((late, event.COMMIT_ANSWERED, late) for late in closing),
        *((late, event.COMMIT_FAILED, late) for late in closing),
    ]


LEASES = StateTable(_lease_rows())
HANDOVERS = StateTable(_handover_rows())
