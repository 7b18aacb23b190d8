"""The store's bookkeeping against a model of it: what is evicted, what is never touched."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from engine.errors import CapacityError, InvalidRequestError
from kv_transfer.store.shelf import Delivery, Shelf


def chain(name: str, num_blocks: int) -> list[bytes]:
    """Hashes of a sequence's blocks."""
    return [f"{name}{index}".encode() for index in range(num_blocks)]


def filled(shelf: Shelf, *names: str, num_blocks: int = 2) -> Shelf:
    for name in names:
        shelf.accept(shelf.expect(chain(name, num_blocks)))
    return shelf


def test_least_recently_used_sequence_goes_first_and_its_tail_before_its_head():
    evicted: list[bytes] = []
    shelf = filled(Shelf(4, on_evict=lambda block_hash, _: evicted.append(block_hash)), "a", "b")
    shelf.unpin(chain("a", 2)[: len(shelf.pin(chain("a", 2)))])  # used again
    filled(shelf, "c", num_blocks=3)
    assert evicted == [b"b1", b"b0", b"a1"]
    assert shelf.num_leading(chain("a", 2)) == 1


def test_pinned_block_is_not_evicted_however_old():
    shelf = filled(Shelf(4), "a", "b")
    blocks = shelf.pin(chain("a", 2))
    with pytest.raises(CapacityError, match="need 3 blocks, 0 are free and 2 not in use"):
        shelf.expect(chain("c", 3))
    shelf.check_conservation()
    filled(shelf, "c")
    assert shelf.pin(chain("a", 2)) == blocks
    assert shelf.num_leading(chain("b", 2)) == 0


def test_delivery_names_what_is_here_and_what_another_one_brings():
    shelf = filled(Shelf(8), "a")
    first = shelf.expect(chain("a", 4))
    second = shelf.expect(chain("a", 5))
    assert (first.num_known, second.num_known) == (2, 4)
    assert second.block_ids[:4] == first.block_ids
    assert shelf.num_leading(chain("a", 5)) == 2, "nothing has arrived yet"
    shelf.accept(first)
    shelf.accept(second)
    assert shelf.num_leading(chain("a", 5)) == 5
    assert (shelf.num_arriving, shelf.num_pinned, shelf.num_filed) == (0, 0, 5)


def test_blocks_of_a_refused_delivery_are_free_at_once():
    shelf = Shelf(4)
    assert shelf.refuse(shelf.expect(chain("a", 4))) == 4
    assert shelf.num_leading(chain("a", 4)) == 0
    filled(shelf, "b", num_blocks=4)


def test_tail_that_outlived_its_head_is_not_kept_twice():
    shelf = filled(Shelf(4), "a", num_blocks=3)
    held = shelf.pin(chain("a", 3)[1:])
    filled(shelf, "b")  # takes a0
    shelf.unpin(chain("a", 3)[1:])
    again = shelf.expect(chain("a", 3))
    assert again.num_known == 0
    assert not set(again.block_ids) & set(held[:1])
    shelf.accept(again)
    shelf.check_conservation()
    assert shelf.num_leading(chain("a", 3)) == 3
    assert shelf.num_arriving == 0, "the second copy's block is free"
    filled(shelf, "c", num_blocks=4)


def test_tail_is_kept_when_the_delivery_that_it_built_on_was_refused():
    shelf = Shelf(8)
    head, tail = shelf.expect(chain("a", 3)), shelf.expect(chain("a", 5))
    shelf.refuse(head)
    shelf.accept(tail)
    assert (shelf.num_leading(chain("a", 5)), shelf.num_filed) == (0, 2)
    again = shelf.expect(chain("a", 5))
    shelf.accept(again)
    assert (shelf.num_leading(chain("a", 5)), shelf.num_filed, shelf.num_arriving) == (5, 5, 0)


def test_sequence_with_a_hash_twice_is_refused():
    with pytest.raises(InvalidRequestError, match="one hash"):
        Shelf(4).expect([b"a", b"a"])


class ShelfMachine(RuleBasedStateMachine):
    """Random sequences over few hashes; blocks carry the content that their hash stands for."""

    deliveries = Bundle("deliveries")
    pins = Bundle("pins")
    chains = st.tuples(st.sampled_from("abc"), st.integers(1, 5)).map(lambda each: chain(*each))

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf(8, on_evict=self.on_evict)
        self.content: dict[int, bytes] = {}
        self.pinned: list[bytes] = []
        self.num_open = 0

    def on_evict(self, block_hash: bytes, block_id: int) -> None:
        assert self.content[block_id] == block_hash, "the spill would get other bytes"
        assert block_hash not in self.pinned, "somebody reads it"

    @rule(target=deliveries, hashes=chains)
    def expect(self, hashes: list[bytes]):
        try:
            delivery = self.shelf.expect(hashes)
        except CapacityError:
            return multiple()
        written = {block_id for _, block_id in delivery.new_blocks}
        assert len(set(delivery.block_ids)) == len(hashes)
        assert not written & {
            self.shelf._filed[each].block_id for each in self.pinned if each in self.shelf
        }
        for block_hash, block_id in delivery.new_blocks:
            self.content[block_id] = b"half of " + block_hash
        self.num_open += 1
        return delivery

    @rule(delivery=consumes(deliveries))
    def accept(self, delivery: Delivery) -> None:
        for block_hash, block_id in delivery.new_blocks:
            self.content[block_id] = block_hash
        self.shelf.accept(delivery)
        self.num_open -= 1

    @rule(delivery=consumes(deliveries))
    def refuse(self, delivery: Delivery) -> None:
        assert self.shelf.refuse(delivery) == len(delivery.new_blocks)
        self.num_open -= 1

    @rule(target=pins, hashes=chains)
    def pin(self, hashes: list[bytes]):
        blocks = self.shelf.pin(hashes)
        leading = hashes[: len(blocks)]
        assert [self.content[block_id] for block_id in blocks] == leading
        self.pinned += leading
        return leading

    @rule(leading=consumes(pins))
    def unpin(self, leading: list[bytes]) -> None:
        self.shelf.unpin(leading)
        for block_hash in leading:
            self.pinned.remove(block_hash)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.shelf.check_conservation()
        for block_hash in self.pinned:
            assert self.content[self.shelf._filed[block_hash].block_id] == block_hash
        if not self.num_open:
            assert self.shelf.num_arriving == 0
            if not self.pinned:
                assert self.shelf.num_pinned == 0


TestShelf = ShelfMachine.TestCase
TestShelf.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
