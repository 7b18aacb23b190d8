"""Which block of the store's memory holds which content. Pure bookkeeping; one thread.

A block is free, being written (arriving), or filed under its hash. Filed blocks that nobody has
pinned may be evicted, the least recently used first; of one sequence the tail goes before the
head, since a block is of no use without those before it.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.errors import CapacityError, InvalidRequestError


@dataclass(slots=True, eq=False)
class _Filed:
    block_id: int
    num_pins: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """Blocks on their way into the store; ended by `Shelf.accept` or `Shelf.refuse`, once."""

    block_hashes: tuple[bytes, ...]
    block_ids: tuple[int, ...]
    """One for each hash. The first `num_known` are here already, or on their way."""
    num_known: int
    pinned: tuple[bytes, ...]

    @property
    def new_blocks(self) -> list[tuple[bytes, int]]:
        """What is to be written."""
        pairs = list(zip(self.block_hashes, self.block_ids, strict=True))
        return pairs[self.num_known :]


class Shelf:
    """`num_blocks` blocks; after an error it is unchanged."""

    def __init__(
        self,
        num_blocks: int,
        *,
        on_evict: Callable[[bytes, int], None] = lambda block_hash, block_id: None,
    ) -> None:
        """`on_evict` is told hash and block before the block is used for something else."""
        self.num_blocks = num_blocks
        self.num_accepted = 0
        self.num_evicted = 0
        self._on_evict = on_evict
        self._free = list(range(num_blocks - 1, -1, -1))
        self._filed: dict[bytes, _Filed] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()  # the next to be evicted stands first
        self._arriving: dict[bytes, int] = {}

    @property
    def num_filed(self) -> int:
        return len(self._filed)

    @property
    def num_pinned(self) -> int:
        """Blocks that are being read, or that a delivery builds on."""
        return len(self._filed) - len(self._idle)

    @property
    def num_arriving(self) -> int:
        return self.num_blocks - len(self._free) - len(self._filed)

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._filed

    def num_leading(self, block_hashes: Sequence[bytes]) -> int:
        """Leading hashes whose blocks are here."""
        return next(
            (index for index, block_hash in enumerate(block_hashes) if block_hash not in self),
            len(block_hashes),
        )

    def pin(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Keep the leading blocks that are here, until `unpin` of as many hashes."""
        leading = block_hashes[: self.num_leading(block_hashes)]
        for block_hash in leading:
            self._pin(block_hash)
        return [self._filed[block_hash].block_id for block_hash in leading]

    def unpin(self, block_hashes: Sequence[bytes]) -> None:
        """They were used just now."""
        for block_hash in reversed(block_hashes):
            filed = self._filed[block_hash]
            assert filed.num_pins > 0, f"block {filed.block_id} unpinned twice"
            filed.num_pins -= 1
            if filed.num_pins == 0:
                self._idle[block_hash] = None

    def fitting(self, block_hashes: Sequence[bytes]) -> Sequence[bytes]:
        """Leading hashes, as many as `expect` has blocks for now."""
        num_known = len(self._known(block_hashes))
        num_evictable = self._num_evictable(block_hashes[:num_known])
        return block_hashes[: num_known + len(self._free) + num_evictable]

    def expect(self, block_hashes: Sequence[bytes]) -> Delivery:
        """Blocks for all hashes: leading ones that are here or arriving, then ones to be written.

        Raises:
            InvalidRequestError: a hash comes twice.
            CapacityError: too many blocks are pinned or arriving.
        """
        if len(set(block_hashes)) != len(block_hashes):
            raise InvalidRequestError("two blocks of one sequence cannot have one hash")
        known = self._known(block_hashes)
        pinned = tuple(each for each in block_hashes[: len(known)] if each in self._filed)
        num_new = len(block_hashes) - len(known)
        num_evictable = self._num_evictable(block_hashes[: len(known)])
        if num_new > len(self._free) + num_evictable:
            raise CapacityError(
                f"need {num_new} blocks, {len(self._free)} are free and {num_evictable} not in use"
            )
        for block_hash in pinned:
            self._pin(block_hash)
        fresh = [self._take() for _ in range(num_new)]
        delivery = Delivery(tuple(block_hashes), (*known, *fresh), len(known), pinned)
        for block_hash, block_id in delivery.new_blocks:
            self._arriving.setdefault(block_hash, block_id)
        return delivery

    def accept(self, delivery: Delivery) -> None:
        """The new blocks are written."""
        self._end(delivery)
        for block_hash, block_id in reversed(delivery.new_blocks):
            if block_hash in self._filed:  # written twice: an older tail outlived its head
                self._free.append(block_id)
                continue
            self._filed[block_hash] = _Filed(block_id)
            self._idle[block_hash] = None
            self.num_accepted += 1
        self.unpin(delivery.pinned)

    def refuse(self, delivery: Delivery) -> int:
        """The new blocks were not written, and nobody writes them any more; returns how many."""
        self._end(delivery)
        for _, block_id in delivery.new_blocks:
            self._free.append(block_id)
        self.unpin(delivery.pinned)
        return len(delivery.new_blocks)

    def check_conservation(self) -> None:
        """Assert that each block is in one place, and that idle means filed and unpinned."""
        filed = {entry.block_id for entry in self._filed.values()}
        assert len(filed) == len(self._filed), "two hashes share a block"
        assert not filed & set(self._free), "a filed block is free"
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert self.num_arriving >= 0, "more blocks than there are"
        idle = {key for key, entry in self._filed.items() if entry.num_pins == 0}
        assert idle == set(self._idle), "idle blocks are not the unpinned ones"

    def _known(self, block_hashes: Sequence[bytes]) -> list[int]:
        """Blocks of leading hashes that are here or arriving."""
        known: list[int] = []
        for block_hash in block_hashes:
            if (filed := self._filed.get(block_hash)) is not None:
                known.append(filed.block_id)
            elif (arriving := self._arriving.get(block_hash)) is not None:
                known.append(arriving)
            else:
                break
        return known

    def _num_evictable(self, known_hashes: Sequence[bytes]) -> int:
        """Blocks that nobody uses, but for these."""
        return len(self._idle) - sum(1 for each in known_hashes if each in self._idle)

    def _end(self, delivery: Delivery) -> None:
        for block_hash, block_id in delivery.new_blocks:
            if self._arriving.get(block_hash) == block_id:
                del self._arriving[block_hash]

    def _pin(self, block_hash: bytes) -> None:
        filed = self._filed[block_hash]
        filed.num_pins += 1
        self._idle.pop(block_hash, None)

    def _take(self) -> int:
        if self._free:
            return self._free.pop()
        block_hash, _ = self._idle.popitem(last=False)
        block_id = self._filed[block_hash].block_id
        self._on_evict(block_hash, block_id)
        del self._filed[block_hash]
        self.num_evicted += 1
        return block_id
