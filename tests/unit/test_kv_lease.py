"""LeaseTable: nothing leaks, and no block comes back before its writer is fenced."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from engine.errors import DuplicateRequestError, KvLeaseLostError
from kv_transfer.lease import Lease, LeaseTable
from kv_transfer.states import LEASES, LeaseEvent, LeaseState
from tests.fakes.clock import FakeClock


def table_with(clock: FakeClock) -> LeaseTable:
    return LeaseTable(clock, max_lease_s=5.0, max_hold_s=20.0, retention_s=60.0)


def grant(table: LeaseTable, request_id: str = "r", lease_s: float = 5.0) -> Lease:
    lease = table.wait(request_id, owner="p", num_tokens=8)
    table.grant(lease, block_ids=[1, 2], num_cached_tokens=0, lease_s=lease_s)
    return lease


def test_a_lease_that_waits_is_nobodys_to_renew_or_to_end_by_its_number() -> None:
    table = table_with(FakeClock())
    lease = table.wait("r", owner="p", num_tokens=8)
    assert table.get(lease.lease_id) is None
    assert table.renew([lease.lease_id], 5.0) == [lease.lease_id]
    assert (table.num_waiting, table.num_live) == (1, 0)
    assert table.revoke(lease, LeaseEvent.ABORTED)
    table.freed(lease)
    assert table.held_by("r") is None
    assert not table.ended  # nothing was granted


def test_a_request_holds_one_lease_at_a_time() -> None:
    table = table_with(FakeClock())
    lease = grant(table)
    with pytest.raises(DuplicateRequestError):
        grant(table)
    table.revoke(lease, LeaseEvent.RELEASED)
    with pytest.raises(DuplicateRequestError):
        grant(table)  # in quarantine
    table.freed(lease)
    assert grant(table).lease_id != lease.lease_id


def test_a_lease_is_never_longer_than_the_table_allows() -> None:
    clock = FakeClock()
    assert grant(table_with(clock), lease_s=100).expires_s == clock() + 5


def test_renewal_moves_the_end_until_the_longest_hold() -> None:
    clock = FakeClock()
    table = table_with(clock)
    lease = grant(table)
    for _ in range(4):
        clock.advance(4)
        assert table.renew([lease.lease_id], 5.0) == []
    assert lease.expires_s == lease.granted_s + 20
    clock.advance(4)
    assert table.renew([lease.lease_id], 5.0) == [lease.lease_id]
    assert table.expire() == [lease]


def test_a_short_renewal_does_not_shorten_a_lease() -> None:
    table = table_with(FakeClock())
    lease = grant(table)
    end_s = lease.expires_s
    assert table.renew([lease.lease_id], 0.1) == []
    assert lease.expires_s == end_s


@pytest.mark.parametrize("sweep", [True, False], ids=["swept", "not-swept-yet"])
def test_a_lease_that_is_over_is_neither_renewed_nor_committed(sweep: bool) -> None:
    clock = FakeClock()
    table = table_with(clock)
    lease = grant(table)
    clock.advance(5)
    if sweep:
        table.expire()
    assert table.renew([lease.lease_id, 99], 5.0) == [lease.lease_id, 99]
    with pytest.raises(KvLeaseLostError, match="expired"):
        table.begin_commit(lease)


def test_a_commit_under_way_does_not_expire() -> None:
    clock = FakeClock()
    table = table_with(clock)
    lease = grant(table)
    table.begin_commit(lease)
    clock.advance(100)
    assert table.expire() == []
    table.finish_commit(lease)
    assert table.ended == {LeaseEvent.COMMITTED: 1}


def test_ended_leases_are_remembered_for_a_while() -> None:
    clock = FakeClock()
    table = table_with(clock)
    lease = grant(table)
    table.begin_commit(lease)
    table.finish_commit(lease)
    clock.advance(64)
    assert table.purge() == []
    assert table.get(lease.lease_id) is lease
    clock.advance(1)
    assert table.purge() == [lease.lease_id]
    assert table.get(lease.lease_id) is None


def test_no_lease_is_forgotten_before_its_deadline_and_a_long_one_stops_no_other() -> None:
    clock = FakeClock()
    table = LeaseTable(clock, max_lease_s=300.0, max_hold_s=300.0, retention_s=60.0)
    short, long = grant(table, "short"), grant(table, "long", lease_s=300.0)
    for lease in (long, short):
        table.revoke(lease, LeaseEvent.RELEASED)
        table.freed(lease)
    clock.advance(359)
    assert table.purge() == []
    clock.advance(1)
    assert table.purge() == [long.lease_id, short.lease_id]


class CountingDict(dict[int, Lease]):
    """Counts how many of its entries were looked through."""

    num_seen = 0

    def items(self) -> Any:
        self.num_seen += len(self)
        return super().items()


def test_the_sweep_looks_at_no_lease_that_ended_a_short_while_ago() -> None:
    clock = FakeClock()
    table = table_with(clock)
    leases = table._leases = CountingDict()
    for index in range(500):
        lease = grant(table, f"r{index}")
        table.begin_commit(lease)
        table.finish_commit(lease)
        clock.advance(0.01)
        assert table.purge() == []
    assert (len(leases), leases.num_seen) == (500, 0)
    clock.advance(62.5)
    assert len(table.purge()) == 250
    assert len(leases) == len(table._remembered) == 250


def test_an_impossible_move_is_a_bug() -> None:
    table = table_with(FakeClock())
    lease = grant(table)
    with pytest.raises(AssertionError, match="cannot be fenced when it is reserved"):
        table.freed(lease)


class Handovers(RuleBasedStateMachine):
    """Writers, a table and a pool of blocks, in any order of events."""

    @initialize()
    def start(self) -> None:
        self.clock = FakeClock()
        self.table = table_with(self.clock)
        self.free = set(range(12))
        self.owned_by_sequences: set[int] = set()
        self.leases: list[Lease] = []
        self.writing: set[int] = set()  # leases whose writer is in the middle of a slice
        self.num_granted = 0

    def may_write(self, lease: Lease) -> bool:
        """What every data plane checks before a slice: fenced leases let no one in."""
        return lease.state is LeaseState.RESERVED

    @rule(request=st.integers(0, 5), num_blocks=st.integers(1, 5), lease_s=st.floats(0.5, 9))
    def reserve(self, request: int, num_blocks: int, lease_s: float) -> None:
        if num_blocks > len(self.free):
            return
        block_ids = sorted(self.free)[:num_blocks]
        request_id = f"r{request}"
        is_held = self.table.held_by(request_id) is not None
        try:
            lease = self.table.wait(request_id, owner="p", num_tokens=num_blocks)
        except DuplicateRequestError:
            assert is_held
            return
        assert not is_held
        self.table.grant(lease, block_ids=block_ids, num_cached_tokens=0, lease_s=lease_s)
        self.free -= set(block_ids)
        self.leases.append(lease)
        self.num_granted += 1

    @rule(pick=st.integers(0, 30))
    def begin_slice(self, pick: int) -> None:
        if self.leases and self.may_write(lease := self.leases[pick % len(self.leases)]):
            self.writing.add(lease.lease_id)

    @rule(pick=st.integers(0, 30))
    def end_slice(self, pick: int) -> None:
        if self.writing:
            self.writing.remove(sorted(self.writing)[pick % len(self.writing)])

    @rule(
        pick=st.integers(0, 30), reason=st.sampled_from([LeaseEvent.RELEASED, LeaseEvent.ABORTED])
    )
    def revoke(self, pick: int, reason: LeaseEvent) -> None:
        if self.leases:
            lease = self.leases[pick % len(self.leases)]
            could = lease.state is LeaseState.RESERVED
            assert self.table.revoke(lease, reason) is could

    @rule(pick=st.integers(0, 30))
    def commit(self, pick: int) -> None:
        if not self.leases:
            return
        lease = self.leases[pick % len(self.leases)]
        if lease.lease_id in self.writing:
            return
        is_live = lease.state is LeaseState.RESERVED and self.clock() < lease.expires_s
        try:
            is_first = self.table.begin_commit(lease)
        except KvLeaseLostError:
            assert not is_live
            return
        assert is_first is is_live
        if not is_first:
            assert lease.state is LeaseState.COMMITTED
            return
        self.table.finish_commit(lease)
        self.owned_by_sequences |= set(lease.block_ids)

    @rule(pick=st.integers(0, 30), lease_s=st.floats(0.1, 9))
    def renew(self, pick: int, lease_s: float) -> None:
        if not self.leases:
            return
        lease = self.leases[pick % len(self.leases)]
        is_over = self.clock() >= lease.expires_s
        lost = self.table.renew([lease.lease_id], lease_s)
        if lease.state is LeaseState.RESERVED:
            assert bool(lost) is is_over
        assert lease.expires_s <= lease.granted_s + 20

    @rule(seconds=st.floats(0, 6))
    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule()
    def expire(self) -> None:
        for lease in self.table.expire():
            assert lease.expires_s <= self.clock()

    @rule(pick=st.integers(0, 30))
    def free_what_is_fenced(self, pick: int) -> None:
        quarantined = [lease for lease in self.leases if lease.state is LeaseState.REVOKED]
        if not quarantined:
            return
        lease = quarantined[pick % len(quarantined)]
        if lease.lease_id in self.writing:
            return  # the fence is not up yet
        self.table.freed(lease)
        self.free |= set(lease.block_ids)

    @rule()
    def end_sequences(self) -> None:
        self.free |= self.owned_by_sequences
        self.owned_by_sequences.clear()

    @rule()
    def purge(self) -> None:
        gone = set(self.table.purge())
        assert all(
            lease.state in (LeaseState.COMMITTED, LeaseState.FREED)
            for lease in self.leases
            if lease.lease_id in gone
        )
        self.leases = [lease for lease in self.leases if lease.lease_id not in gone]

    @invariant()
    def blocks_are_conserved(self) -> None:
        held = [
            block_id
            for lease in self.leases
            if not LEASES.is_final(lease.state)
            for block_id in lease.block_ids
        ]
        everywhere = [*held, *self.free, *self.owned_by_sequences]
        assert sorted(everywhere) == list(range(12))

    @invariant()
    def nobody_writes_into_free_blocks(self) -> None:
        for lease in self.leases:
            if lease.lease_id in self.writing:
                assert not self.free & set(lease.block_ids)

    @invariant()
    def counts_agree(self) -> None:
        states = [lease.state for lease in self.leases]
        assert self.table.num_quarantined == states.count(LeaseState.REVOKED)
        assert self.table.num_live == states.count(LeaseState.RESERVED)
        num_open = self.table.num_live
        assert self.num_granted == num_open + sum(self.table.ended.values())


Handovers.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
TestHandovers = Handovers.TestCase
