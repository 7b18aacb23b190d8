"""Blocks taken for a fetch are lent once, to who was expected; others go to the engine."""

from collections.abc import Sequence

import pytest

from engine.errors import InvalidRequestError, UnknownRequestError
from engine.runtime.commands import Reservation
from kv_transfer.prefix.lender import PrefixLender

TAKEN = Reservation((4, 5, 6, 7), num_cached_tokens=16)


class RecordingEngine:
    """Both what adopts prefixes and what lends blocks to requests."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    async def adopt_prefix(self, hold_id: str, num_blocks: int) -> None:
        self.calls.append(("adopt", hold_id, num_blocks))

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        self.calls.append(("reserve", request_id))
        return Reservation((0,), 0)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        self.calls.append(("commit", request_id))

    async def cancel_reservation(self, request_id: str) -> int:
        self.calls.append(("cancel", request_id))
        return 3


def lender_of(*, lends_to_requests: bool) -> tuple[PrefixLender, RecordingEngine]:
    engine = RecordingEngine()
    requests = engine if lends_to_requests else None
    return PrefixLender(engine, requests, block_size_tokens=16), engine  # type: ignore[arg-type]


async def test_expected_blocks_are_lent_as_far_as_they_are_filled_and_then_adopted():
    lender, engine = lender_of(lends_to_requests=True)
    lender.expect("f", TAKEN)
    assert await lender.reserve("f", 48, ()) == Reservation((4, 5, 6), 16)
    await lender.commit("f", 0)
    assert engine.calls == [("adopt", "f", 3)]


async def test_blocks_are_lent_once():
    """After the first time they may be part of the prefix cache, or of another sequence."""
    lender, _ = lender_of(lends_to_requests=True)
    lender.expect("f", TAKEN)
    await lender.reserve("f", 64, ())
    with pytest.raises(UnknownRequestError, match="handed over before"):
        await lender.reserve("f", 64, ())


@pytest.mark.parametrize("num_tokens", [80, 63])
async def test_what_was_not_taken_is_not_lent(num_tokens: int):
    lender, _ = lender_of(lends_to_requests=False)
    lender.expect("f", TAKEN)
    with pytest.raises(InvalidRequestError, match="4 blocks of 16 tokens"):
        await lender.reserve("f", num_tokens, ())


async def test_a_lease_that_ends_leaves_the_blocks_with_who_took_them():
    lender, engine = lender_of(lends_to_requests=True)
    lender.expect("f", TAKEN)
    await lender.reserve("f", 64, ())
    assert await lender.cancel_reservation("f") == 0
    assert engine.calls == []


async def test_nothing_is_lent_after_it_was_forgotten():
    lender, _ = lender_of(lends_to_requests=False)
    lender.expect("f", TAKEN)
    lender.forget("f")
    with pytest.raises(UnknownRequestError, match="nothing is expected as f"):
        await lender.reserve("f", 64, ())
    with pytest.raises(UnknownRequestError):
        await lender.commit("f", 0)
    assert await lender.cancel_reservation("f") == 0


async def test_reservations_of_requests_pass_through():
    lender, engine = lender_of(lends_to_requests=True)
    assert await lender.reserve("r", 7, ()) == Reservation((0,), 0)
    await lender.commit("r", 1)
    assert await lender.cancel_reservation("r") == 3
    assert engine.calls == [("reserve", "r"), ("commit", "r"), ("cancel", "r")]
