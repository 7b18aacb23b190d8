"""Both workers, the network and the clocks simulated through random schedules.

Requests are reserved, pushed, delayed, dropped, repeated, reordered, cut, damaged and aborted, and
workers crash, in every order that the seeds give. All along, no write falls on a block that is
not lent to its writer and nothing is computed from KV that is not its own; at the end every block
is free on both sides. Real: engines, schedulers, senders, receivers, leases, fences. Made up:
time, gRPC, the writing threads (`tests/fakes/sim`).
"""

from collections.abc import Sequence
from typing import Any

import pytest

from engine.kv_cache.progress import KvProgress
from kv_transfer import range_lock
from kv_transfer.gate import Gate
from kv_transfer.handover import Handover
from kv_transfer.lease import Lease, LeaseTable
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.receiver import KvReceiver
from kv_transfer.sending_rank import RankLink, Written
from kv_transfer.slot_ranges import SlotRange
from kv_transfer.states import LeaseEvent, LeaseState
from prefill_worker.prefill import Prefiller
from tests.fakes.sim.chance import ALL_FAULTS, Fault, Plan
from tests.fakes.sim.engine import LAYOUT
from tests.fakes.sim.schedule import explained, first_violation, run_schedule

PER_TEST = 250


def check(seeds: range) -> None:
    for seed in seeds:
        plan = Plan(seed)
        if run_schedule(plan).violations:
            pytest.fail(explained(plan))


@pytest.mark.parametrize("first_seed", range(0, 2_000, PER_TEST))
def test_nothing_leaks_and_no_block_is_reused_too_early(first_seed: int) -> None:
    check(range(first_seed, first_seed + PER_TEST))


@pytest.mark.slow
@pytest.mark.parametrize("first_seed", range(2_000, 22_000, 1_000))
def test_nothing_leaks_in_many_more_schedules(first_seed: int) -> None:
    check(range(first_seed, first_seed + 1_000))


def test_a_seed_always_gives_the_same_course_of_events() -> None:
    for seed in range(20):
        first, again = (run_schedule(Plan(seed), is_tracing=True).trace for _ in range(2))
        assert first == again
        assert first


# Each promise is needed: without it, the schedules above go wrong.


def no_shm_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(range_lock, "fence", lambda fd, lease_id: True)


def no_tcp_fence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "fence", lambda self, lease_id: [])


def a_fence_that_does_not_wait_for_the_write_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fence(self: LocalReceivingRank, lease_id: int) -> None:
        for plane in self._planes:
            plane.fence(lease_id, is_forced=False)

    monkeypatch.setattr(LocalReceivingRank, "fence", fence)


def a_push_that_does_not_wait_for_its_acknowledgement(monkeypatch: pytest.MonkeyPatch) -> None:
    async def write(
        self: Handover, link: RankLink, parts: Sequence[SlotRange], step: int | None
    ) -> Written:
        writing = link.write(self._permit, parts, step)
        self._writes.add(writing)
        writing.add_done_callback(self._end_write)
        return Written(sum(part.num_slots for part in parts) * LAYOUT.bytes_per_token, 0)

    commit = Handover.commit

    async def commit_at_once(self: Handover, first_token_id: int) -> None:
        self._writes = set()
        await commit(self, first_token_id)

    monkeypatch.setattr(Handover, "_write_once", write)
    monkeypatch.setattr(Handover, "commit", commit_at_once)


def a_close_that_does_not_wait_for_the_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Handover.close

    async def close_at_once(self: Handover) -> None:
        self._writes = set()
        await close(self)

    monkeypatch.setattr(Handover, "close", close_at_once)


def leases_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LeaseTable, "expire", lambda self: [])


def an_abort_that_overlooks_who_waits_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    end = KvReceiver._end

    async def end_if_granted(self: KvReceiver, lease: Lease, reason: LeaseEvent) -> int:
        return 0 if lease.state is LeaseState.WAITING else await end(self, lease, reason)

    monkeypatch.setattr(KvReceiver, "_end", end_if_granted)


def an_abort_that_frees_what_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    abort = Prefiller.abort

    async def free_first(self: Prefiller, request_id: str) -> int:
        await self._engine.abort(request_id)
        return await abort(self, request_id)

    monkeypatch.setattr(Prefiller, "abort", free_first)


def a_push_that_does_not_wait_for_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KvProgress, "layers_of", lambda self, step: self.num_layers)


def a_push_that_is_repeated_without_shutting_out_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Gate, "_is_newest", lambda self, header, opened: True)
    monkeypatch.setattr(Gate, "_earlier", lambda self, header: [])


@pytest.mark.parametrize(
    ("remove", "faults"),
    [
        (no_shm_fence, ALL_FAULTS),
        (no_tcp_fence, ALL_FAULTS),
        (a_fence_that_does_not_wait_for_the_write_under_way, ALL_FAULTS),
        (a_push_that_does_not_wait_for_its_acknowledgement, ALL_FAULTS),
        (a_close_that_does_not_wait_for_the_writes, ALL_FAULTS),
        (a_push_that_does_not_wait_for_its_step, ALL_FAULTS),
        (leases_that_do_not_end, ALL_FAULTS),
        (an_abort_that_overlooks_who_waits_in_line, ALL_FAULTS),
        (an_abort_that_frees_what_is_still_read, ALL_FAULTS),
        # What was given up must come late, and damaged: rare among all the others.
        (
            a_push_that_is_repeated_without_shutting_out_the_first,
            frozenset({Fault.STALL, Fault.CORRUPT}),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_it_a_schedule_goes_wrong(
    monkeypatch: pytest.MonkeyPatch, remove: Any, faults: frozenset[Fault]
) -> None:
    remove(monkeypatch)
    assert first_violation(range(1_000), faults) is not None
