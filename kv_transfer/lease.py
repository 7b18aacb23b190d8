"""Leases on decode's blocks while somebody else writes them. Pure bookkeeping; one thread."""

import secrets
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engine.errors import DuplicateRequestError, KvLeaseLostError
from kv_transfer.states import LEASES, LeaseEvent, LeaseState


@dataclass(slots=True)
class Lease:
    """Blocks held for one writer. Changed by its table only."""

    lease_id: int
    request_id: str
    owner: str
    num_tokens: int
    granted_s: float
    """When it came in line, until it was granted."""
    expires_s: float
    block_ids: tuple[int, ...] = ()
    num_cached_tokens: int = 0
    state: LeaseState = LeaseState.WAITING
    end_reason: LeaseEvent | None = None


def _random_id() -> int:
    # Not guessable, so that only its owner can write under it; small enough for a file offset.
    return secrets.randbits(62) | 1


class LeaseTable:
    """Every lease that waits, is live, is in quarantine, or ended a short while ago.

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
        self._remembered: deque[tuple[float, int]] = deque()
        """Until when, and the lease's id; in the order of their ends."""
        self.ended: Counter[LeaseEvent] = Counter()
        """Leases that had been granted, by why they ended."""

    @property
    def num_waiting(self) -> int:
        return self._count(LeaseState.WAITING)

    @property
    def num_live(self) -> int:
        return self._count(LeaseState.RESERVED) + self._count(LeaseState.COMMITTING)

    @property
    def num_quarantined(self) -> int:
        return self._count(LeaseState.REVOKED)

    def wait(self, request_id: str, *, owner: str, num_tokens: int) -> Lease:
        """Put a request in line for blocks.

        Raises:
            DuplicateRequestError: it waits or holds blocks here; the table is unchanged.
        """
        if request_id in self._held:
            raise DuplicateRequestError(f"blocks are reserved for request {request_id} already")
        lease_id = self._new_id()
        assert lease_id not in self._leases, f"lease id {lease_id} drawn twice"
        now_s = self._clock()
        lease = Lease(lease_id, request_id, owner, num_tokens, granted_s=now_s, expires_s=now_s)
        self._leases[lease_id] = self._held[request_id] = lease
        return lease

    def grant(
        self, lease: Lease, *, block_ids: Sequence[int], num_cached_tokens: int, lease_s: float
    ) -> None:
        """Let the owner write into blocks that were just taken, from now on."""
        self._move(lease, LeaseEvent.GRANTED)
        lease.block_ids = tuple(block_ids)
        lease.num_cached_tokens = num_cached_tokens
        lease.granted_s = self._clock()
        lease.expires_s = lease.granted_s + min(lease_s, self._max_lease_s)

    def held_by(self, request_id: str) -> Lease | None:
        """The lease under which a request waits or holds blocks, in quarantine or not."""
        return self._held.get(request_id)

    def get(self, lease_id: int) -> Lease | None:
        """One that was granted, also if it ended a short while ago."""
        lease = self._leases.get(lease_id)
        return None if lease is None or lease.state is LeaseState.WAITING else lease

    def renew(self, lease_ids: Iterable[int], lease_s: float) -> list[int]:
        """Move the ends of live leases; returns those that are lost, which are unchanged."""
        now_s = self._clock()
        lost = []
        for lease_id in lease_ids:
            lease = self.get(lease_id)
            if lease is None or self._is_over(lease):
                lost.append(lease_id)
                continue
            self._move(lease, LeaseEvent.RENEWED)
            if lease.state is LeaseState.RESERVED:
                wanted_s = now_s + min(lease_s, self._max_lease_s)
                end_s = min(wanted_s, lease.granted_s + self._max_hold_s)
                lease.expires_s = max(lease.expires_s, end_s)
        return lost

    def begin_commit(self, lease: Lease) -> bool:
        """True when the commit is to be carried out: it is the first one.

        Raises:
            KvLeaseLostError: the lease is over; it is unchanged.
        """
        if self._is_over(lease):
            raise KvLeaseLostError(
                f"lease {lease.lease_id} of request {lease.request_id} is over"
                f" ({lease.end_reason or LeaseEvent.EXPIRED})"
            )
        return self._move(lease, LeaseEvent.COMMIT_ASKED)

    def finish_commit(self, lease: Lease) -> None:
        self._move(lease, LeaseEvent.COMMITTED)
        self._end(lease, LeaseEvent.COMMITTED)
        self._remember(lease)

    def revoke(self, lease: Lease, reason: LeaseEvent) -> bool:
        """Into quarantine; False when the lease has ended or is there already."""
        was_granted = lease.state is not LeaseState.WAITING
        if not self._move(lease, reason):
            return False
        if was_granted:
            self._end(lease, reason)
        return True

    def expire(self) -> list[Lease]:
        """Revoke every lease whose time is over and that nobody is committing."""
        over = [
            lease
            for lease in self._held.values()
            if lease.state is LeaseState.RESERVED and self._is_over(lease)
        ]
        for lease in over:
            self.revoke(lease, LeaseEvent.EXPIRED)
        return over

    def freed(self, lease: Lease) -> None:
        """The blocks of a revoked lease are back in the pool: no write can reach them."""
        self._move(lease, LeaseEvent.FENCED)
        self._remember(lease)

    def purge(self) -> list[int]:
        """Drop leases whose time has been over for `retention_s`; looks at these and one more."""
        now_s = self._clock()
        old = []
        while self._remembered and now_s >= self._remembered[0][0]:
            _, lease_id = self._remembered.popleft()
            del self._leases[lease_id]
            old.append(lease_id)
        return old

    def _remember(self, lease: Lease) -> None:
        """Nothing happens to the lease any more, and its request may hold another one."""
        assert LEASES.is_final(lease.state), f"lease {lease.lease_id} is {lease.state}"
        del self._held[lease.request_id]
        # Not before its deadline, which is all that keeps writers out after the fence is forgotten.
        until_s = self._clock() + self._max_lease_s + self._retention_s
        self._remembered.append((until_s, lease.lease_id))

    def _end(self, lease: Lease, reason: LeaseEvent) -> None:
        lease.end_reason = reason
        self.ended[reason] += 1

    def _is_over(self, lease: Lease) -> bool:
        """Also when its time is over and nobody has looked since."""
        if lease.state is LeaseState.RESERVED:
            return self._clock() >= lease.expires_s
        return lease.state in {LeaseState.REVOKED, LeaseState.FREED}

    def _count(self, state: LeaseState) -> int:
        return sum(lease.state is state for lease in list(self._held.values()))

    @staticmethod
    def _move(lease: Lease, event: LeaseEvent) -> bool:
        """False when the event changed nothing."""
        before = lease.state
        name = f"lease {lease.lease_id} of request {lease.request_id}"
        lease.state = LEASES.after(before, event, name)
        return lease.state is not before
