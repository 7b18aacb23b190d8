"""Leases on decode's blocks while somebody else writes them. Pure bookkeeping; one thread."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from engine.errors import DuplicateRequestError, KvLeaseLostError


class LeaseState(StrEnum):
    RESERVED = "reserved"
    """Its owner may write."""
    COMMITTING = "committing"
    """Its owner says that all is written; the engine is being told."""
    COMMITTED = "committed"
    """The blocks belong to the sequence."""
    REVOKED = "revoked"
    """Quarantine: nobody may begin to write, but a write may still be under way."""
    FREED = "freed"
    """The blocks are back in the pool."""


MOVES: dict[LeaseState, frozenset[LeaseState]] = {
    LeaseState.RESERVED: frozenset({LeaseState.COMMITTING, LeaseState.REVOKED}),
    LeaseState.COMMITTING: frozenset({LeaseState.COMMITTED, LeaseState.REVOKED}),
    LeaseState.REVOKED: frozenset({LeaseState.FREED}),
    LeaseState.COMMITTED: frozenset(),
    LeaseState.FREED: frozenset(),
}


class EndReason(StrEnum):
    """Why a lease ended; a metric label."""

    COMMITTED = "committed"
    RELEASED = "released"
    """Given back by its owner."""
    EXPIRED = "expired"
    ABORTED = "aborted"
    """The decode side gave the request up."""
    REFUSED = "refused"
    """The commit did not fit what was reserved, or the engine did not take it."""


@dataclass(slots=True)
class Lease:
    """Blocks held for one writer. Changed by its table only."""

    lease_id: int
    request_id: str
    owner: str
    block_ids: tuple[int, ...]
    num_cached_tokens: int
    num_tokens: int
    granted_s: float
    expires_s: float
    state: LeaseState = LeaseState.RESERVED
    end_reason: EndReason | None = None


def _random_id() -> int:
    # Not guessable, so that only its owner can write under it; small enough for a file offset.
    return secrets.randbits(62) | 1


class LeaseTable:
    """Every lease that is live, in quarantine, or ended a short while ago.

    Ended leases are remembered for `retention_s` so that a repeated Commit or Release gets the
    answer of the first one. One thread changes it; another may read the counts.
    """

    def __init__(
        self,
        clock: Callable[[], float],
        *,
        max_lease_s: float,
        max_hold_s: float,
        retention_s: float = 60.0,
        new_id: Callable[[], int] = _random_id,
    ) -> None:
        self._clock = clock
        self._max_lease_s = max_lease_s
        self._max_hold_s = max_hold_s
        self._retention_s = retention_s
        self._new_id = new_id
        self._leases: dict[int, Lease] = {}
        self._held: dict[str, Lease] = {}
        self.ended: Counter[EndReason] = Counter()

    @property
    def num_live(self) -> int:
        return sum(not self._is_revoked(lease) for lease in list(self._held.values()))

    @property
    def num_quarantined(self) -> int:
        return sum(self._is_revoked(lease) for lease in list(self._held.values()))

    def grant(
        self,
        request_id: str,
        *,
        owner: str,
        block_ids: Sequence[int],
        num_cached_tokens: int,
        num_tokens: int,
        lease_s: float,
    ) -> Lease:
        """Record who may write into blocks that were just taken.

        Raises:
            DuplicateRequestError: the request holds blocks here; the table is unchanged.
        """
        if request_id in self._held:
            raise DuplicateRequestError(f"request {request_id} holds reserved blocks already")
        lease_id = self._new_id()
        assert lease_id not in self._leases, f"lease id {lease_id} drawn twice"
        now_s = self._clock()
        lease = Lease(
            lease_id=lease_id,
            request_id=request_id,
            owner=owner,
            block_ids=tuple(block_ids),
            num_cached_tokens=num_cached_tokens,
            num_tokens=num_tokens,
            granted_s=now_s,
            expires_s=now_s + min(lease_s, self._max_lease_s),
        )
        self._leases[lease_id] = self._held[request_id] = lease
        return lease

    def held_by(self, request_id: str) -> Lease | None:
        """The lease under which blocks are held for this request, in quarantine or not."""
        return self._held.get(request_id)

    def get(self, lease_id: int) -> Lease | None:
        """Also a lease that ended a short while ago."""
        return self._leases.get(lease_id)

    def renew(self, lease_ids: Iterable[int], lease_s: float) -> list[int]:
        """Move the ends of live leases; returns those that are lost, which are unchanged."""
        now_s = self._clock()
        lost = []
        for lease_id in lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None or lease.state is LeaseState.REVOKED or self._is_over(lease, now_s):
                lost.append(lease_id)
            elif lease.state is LeaseState.RESERVED:
                wanted_s = now_s + min(lease_s, self._max_lease_s)
                end_s = min(wanted_s, lease.granted_s + self._max_hold_s)
                lease.expires_s = max(lease.expires_s, end_s)
        return lost

    def begin_commit(self, lease: Lease) -> None:
        """Raises KvLeaseLostError when the lease is over; it is unchanged then."""
        if lease.state is not LeaseState.RESERVED or self._is_over(lease, self._clock()):
            raise KvLeaseLostError(
                f"lease {lease.lease_id} of request {lease.request_id} is over"
                f" ({lease.end_reason or EndReason.EXPIRED})"
            )
        self._move(lease, LeaseState.COMMITTING)

    def finish_commit(self, lease: Lease) -> None:
        self._move(lease, LeaseState.COMMITTED)
        self._end(lease, EndReason.COMMITTED)
        del self._held[lease.request_id]

    def revoke(self, lease: Lease, reason: EndReason) -> bool:
        """Into quarantine; False when the lease has ended or is there already."""
        if LeaseState.REVOKED not in MOVES[lease.state]:
            return False
        self._move(lease, LeaseState.REVOKED)
        self._end(lease, reason)
        return True

    def expire(self) -> list[Lease]:
        """Revoke every lease whose time is over and that nobody is committing."""
        now_s = self._clock()
        over = [
            lease
            for lease in self._held.values()
            if lease.state is LeaseState.RESERVED and self._is_over(lease, now_s)
        ]
        for lease in over:
            self.revoke(lease, EndReason.EXPIRED)
        return over

    def freed(self, lease: Lease) -> None:
        """The blocks of a revoked lease are back in the pool: no write can reach them."""
        self._move(lease, LeaseState.FREED)
        del self._held[lease.request_id]

    def purge(self) -> list[int]:
        """Drop leases that ended more than `retention_s` ago, by the end of their time."""
        now_s = self._clock()
        old = [
            lease_id
            for lease_id, lease in self._leases.items()
            if not MOVES[lease.state] and now_s >= lease.expires_s + self._retention_s
        ]
        for lease_id in old:
            del self._leases[lease_id]
        return old

    def _end(self, lease: Lease, reason: EndReason) -> None:
        lease.end_reason = reason
        self.ended[reason] += 1

    @staticmethod
    def _move(lease: Lease, state: LeaseState) -> None:
        assert state in MOVES[lease.state], (
            f"lease {lease.lease_id} of {lease.request_id} cannot go from {lease.state} to {state}"
        )
        lease.state = state

    @staticmethod
    def _is_over(lease: Lease, now_s: float) -> bool:
        return lease.state is LeaseState.FREED or (
            lease.state is LeaseState.RESERVED and now_s >= lease.expires_s
        )

    @staticmethod
    def _is_revoked(lease: Lease) -> bool:
        return lease.state is LeaseState.REVOKED
