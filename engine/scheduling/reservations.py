"""Blocks on behalf of others: of prefill workers that hand KV over, of stores that read or write.

Pure bookkeeping, as `scheduler`, whose part it is.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from engine.errors import CapacityError, DuplicateRequestError, UnknownRequestError
from engine.runtime.commands import Reservation
from engine.scheduling.admission import Admission
from engine.scheduling.limits import EngineLimits


@dataclass(slots=True, eq=False)
class BlockReservation:
    """Blocks taken, or waited for."""

    request_id: str
    num_tokens: int
    hashes: list[bytes]
    ordinal: int
    block_ids: list[int] = field(default_factory=list)
    num_cached_tokens: int = 0
    is_granted: bool = False
    first_token_id: int | None = None
    """Set when the KV is committed."""
    committed_ns: int = 0

    @property
    def is_committed(self) -> bool:
        return self.first_token_id is not None

    def to_reservation(self) -> Reservation:
        return Reservation(tuple(self.block_ids), self.num_cached_tokens)


class Reservations:
    """By request id or hold id; after an error nothing is changed."""

    def __init__(self, admission: Admission, limits: EngineLimits) -> None:
        self._admission = admission
        self._limits = limits
        self._reservations: dict[str, BlockReservation] = {}
        self._waiting: deque[BlockReservation] = deque()

    def __len__(self) -> int:
        return len(self._reservations)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reservations)

    def get(self, request_id: str) -> BlockReservation | None:
        return self._reservations.get(request_id)

    @property
    def waiting(self) -> Iterable[BlockReservation]:
        """Not granted yet, in order of arrival."""
        return self._waiting

    @property
    def block_ids(self) -> set[int]:
        """All blocks that are taken."""
        return {each for known in self._reservations.values() for each in known.block_ids}

    # Handovers: waited for, granted, committed, taken over by their sequence.

    def reserve(self, request_id: str, num_tokens: int, hashes: Sequence[bytes]) -> None:
        """Queue a reservation; `granted_before` answers it.

        Raises:
            DuplicateRequestError: the id has a reservation already.
            CapacityError: it never fits.
        """
        self._limits.check_reservation(num_tokens)
        self._check_new(request_id)
        full_blocks = list(hashes[: num_tokens // self._limits.block_size_tokens])
        reservation = BlockReservation(
            request_id, num_tokens, full_blocks, self._admission.take_ordinal()
        )
        self._reservations[request_id] = reservation
        self._waiting.append(reservation)

    def granted_before(self, ordinal: int | None) -> Iterator[tuple[str, Reservation]]:
        """Grant those that wait in order, those older than `ordinal`, while they fit."""
        while self._waiting:
            reservation = self._waiting[0]
            if ordinal is not None and reservation.ordinal > ordinal:
                return
            allocated = self._admission.allocate(reservation.num_tokens, reservation.hashes)
            if allocated is None:
                return
            self._waiting.popleft()
            reservation.block_ids, reservation.num_cached_tokens = allocated
            reservation.is_granted = True
            yield reservation.request_id, reservation.to_reservation()

    def commit(self, request_id: str, first_token_id: int, now_ns: int) -> None:
        """The blocks hold their KV.

        Raises:
            UnknownRequestError: no granted, uncommitted reservation has this id.
        """
        reservation = self._reservations.get(request_id)
        if reservation is None or not reservation.is_granted or reservation.is_committed:
            raise UnknownRequestError(f"nothing is reserved for request {request_id}")
        self._limits.check_token_ids((first_token_id,), "commit")
        reservation.first_token_id = first_token_id
        reservation.committed_ns = now_ns

    def hand_on(self, request_id: str) -> None:
        """Forget a committed reservation: its blocks are its sequence's from now on."""
        del self._reservations[request_id]

    def drop(self, request_id: str) -> int:
        """Forget it in any state; returns the blocks freed."""
        reservation = self._reservations.pop(request_id, None)
        if reservation is None:
            return 0
        if not reservation.is_granted:
            self._waiting.remove(reservation)
        return self._admission.block_pool.release(reservation.block_ids)

    # Prefixes that others read or write while no sequence of ours needs them.

    def hold(self, hold_id: str, hashes: Sequence[bytes], cached: Sequence[int]) -> Reservation:
        """Take a block for each of `hashes` now, `cached` ones first, until `adopt` or `drop`.

        Raises:
            DuplicateRequestError: the id has a reservation already.
            CapacityError: sequences that decode may need these blocks at once.
        """
        self._check_new(hold_id)
        admission = self._admission
        num_taken = admission.block_pool.num_taken_by(len(hashes), cached)
        if not admission.has_prefix_cache or not admission.has_room(num_taken):
            num_free = admission.block_pool.num_free
            raise CapacityError(f"no {num_taken} KV blocks to spare, {num_free} free")
        hold = BlockReservation(
            hold_id,
            len(hashes) * self._limits.block_size_tokens,
            list(hashes),
            admission.take_ordinal(),
            admission.block_pool.allocate(len(hashes), cached),
            len(cached) * self._limits.block_size_tokens,
            is_granted=True,
        )
        self._reservations[hold_id] = hold
        return hold.to_reservation()

    def adopt(self, hold_id: str, num_blocks: int) -> None:
        """The first `num_blocks` hold their KV: cached from now on; all are free.

        Raises:
            UnknownRequestError: nothing is held under this id.
        """
        hold = self._reservations.pop(hold_id, None)
        if hold is None:
            raise UnknownRequestError(f"no prefix was taken as {hold_id}")
        for block_id, block_hash in zip(
            hold.block_ids[:num_blocks], hold.hashes[:num_blocks], strict=True
        ):
            self._admission.block_pool.register(block_id, block_hash)
        self._admission.block_pool.release(hold.block_ids)

    def _check_new(self, request_id: str) -> None:
        if request_id in self._reservations:
            raise DuplicateRequestError(f"request {request_id} has a reservation already")
