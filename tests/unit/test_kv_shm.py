"""The shared-memory data plane: what is mapped, and what keeps a late writer out."""

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from engine.errors import KvLeaseLostError, PeerUnavailableError
from kv_transfer import local_sending_rank, range_lock
from kv_transfer.blocks import BlockSource, host_blocks, source_from
from kv_transfer.local_sending_rank import LocalLink, WriterChoice
from kv_transfer.offer import RankOffer, ShmOffer
from kv_transfer.plane import WritePermit, WriteStoppedError
from kv_transfer.sending_rank import Target
from kv_transfer.shm import ShmIntake, ShmWriter
from kv_transfer.slot_ranges import SlotRange
from tests.fakes.clock import FakeClock
from tests.fakes.descriptors import open_things
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, DeviceMemory, HostMemory

LEASE_ID = (1 << 62) - 1  # the largest there is
ONE_BLOCK = [SlotRange(0, 0, 3, 0, 4)]


@contextmanager
def pair(slice_bytes: int = 1 << 20) -> Iterator[tuple[ShmIntake, ShmWriter, HostMemory]]:
    with HostMemory() as remote:
        intake = ShmIntake(remote)
        writer = ShmWriter(intake.offer, TINY_LAYOUT, 16, slice_bytes=slice_bytes)
        try:
            yield intake, writer, remote
        finally:
            writer.close()
            intake.close()


def permit(clock: FakeClock, lease_id: int = LEASE_ID) -> WritePermit:
    return WritePermit(lease_id, 1, clock, clock() + 5)


def a_source(memory: HostMemory) -> BlockSource:
    return source_from(memory, host_blocks(memory), ONE_BLOCK)


def test_a_fenced_lease_lets_no_slice_in() -> None:
    with pair() as (intake, writer, remote), HostMemory().fill_randomly(1) as local:
        assert intake.fence(LEASE_ID, is_forced=False)
        with pytest.raises(KvLeaseLostError, match="took lease"):
            writer.write(permit(FakeClock()), a_source(local), ONE_BLOCK, WHOLE)
        assert not remote.rows().any()
        other = permit(FakeClock(), lease_id=7)
        assert writer.write(other, a_source(local), ONE_BLOCK, WHOLE) == TINY_LAYOUT.block_bytes
        np.testing.assert_array_equal(remote.rows()[3], local.rows()[0])


def test_the_deadline_holds_after_the_fence_is_forgotten() -> None:
    with pair() as (intake, writer, remote), HostMemory().fill_randomly(1) as local:
        clock = FakeClock()
        late = permit(clock)
        assert intake.fence(LEASE_ID, is_forced=False)
        clock.advance(5)
        intake.forget(LEASE_ID)
        with pytest.raises(KvLeaseLostError, match="ended before"):
            writer.write(late, a_source(local), ONE_BLOCK, WHOLE)
        assert not remote.rows().any()


class TickingClock(FakeClock):
    """A second passes with each look."""

    def __call__(self) -> float:
        self.advance(1)
        return super().__call__()


def test_the_deadline_is_looked_at_before_every_slice() -> None:
    row_bytes = TINY_LAYOUT.block_bytes // 12
    slice_bytes = 2 * row_bytes
    with pair(slice_bytes) as (_, writer, remote), HostMemory().fill_randomly(1) as local:
        clock = TickingClock()
        late = WritePermit(LEASE_ID, 1, clock, clock() + 4)
        with pytest.raises(KvLeaseLostError):
            writer.write(late, a_source(local), ONE_BLOCK, WHOLE)
        arrived = remote.rows()[3] == local.rows()[0]
        assert arrived[: 6 * row_bytes].all()
        assert not remote.rows()[3][6 * row_bytes :].any()


def test_a_stopped_permit_ends_the_write() -> None:
    with pair() as (_, writer, remote), HostMemory().fill_randomly(1) as local:
        given_up = permit(FakeClock())
        given_up.stopped.set()
        with pytest.raises(WriteStoppedError):
            writer.write(given_up, a_source(local), ONE_BLOCK, WHOLE)
        assert not remote.rows().any()


def a_failure_of(writer: ShmWriter, local: HostMemory) -> KvLeaseLostError:
    late = FakeClock()
    with pytest.raises(KvLeaseLostError) as caught:
        writer.write(WritePermit(LEASE_ID, 1, late, late()), a_source(local), ONE_BLOCK, WHOLE)
    return caught.value


def test_a_failure_that_is_kept_holds_no_descriptor_of_a_closed_writer() -> None:
    with HostMemory() as remote, HostMemory() as local:
        intake = ShmIntake(remote)
        before = open_things()
        writer = ShmWriter(intake.offer, TINY_LAYOUT, 16, slice_bytes=1 << 20)
        error = a_failure_of(writer, local)
        writer.close()
        assert error.__traceback__ is not None
        del error
        assert open_things() == before
        intake.close()


async def test_a_failure_of_a_link_that_is_kept_holds_nothing_of_the_receivers(caplog) -> None:
    with HostMemory() as remote, HostMemory() as local:
        intake = ShmIntake(remote)
        before = open_things()
        writer = ShmWriter(intake.offer, TINY_LAYOUT, 16, slice_bytes=1 << 20)
        offer = RankOffer(intake.offer, None)
        target = Target("d0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
        link = LocalLink(local, host_blocks(local), [target], [WriterChoice(writer, None)])
        assert intake.fence(LEASE_ID, is_forced=False)
        with pytest.raises(KvLeaseLostError, match="took lease") as caught:
            await link.write(permit(FakeClock()), ONE_BLOCK)
        thread = link._thread
        link.close()
        await asyncio.to_thread(thread.shutdown)
        assert caught.value.__traceback__ is not None
        new = open_things() - before
        assert [name for name in new if not name.startswith("thread")] == []
        assert not caplog.records
        intake.close()


async def test_a_small_push_is_there_at_once_but_never_before_one_that_was_asked_for_earlier(
    monkeypatch,
) -> None:
    monkeypatch.setattr(local_sending_rank, "QUICK_BYTES", TINY_LAYOUT.block_bytes)
    go_on = threading.Event()

    class HeldPermit(WritePermit):
        def check(self) -> None:
            assert go_on.wait(10)

    with pair() as (intake, writer, remote), HostMemory().fill_randomly(1) as local:
        target = Target("d0", RankOffer(intake.offer, None), TINY_LAYOUT, 16, "", WHOLE)
        link = LocalLink(local, host_blocks(local), [target], [WriterChoice(writer, None)])
        assert link.write(permit(FakeClock()), ONE_BLOCK).done()
        np.testing.assert_array_equal(remote.rows()[3], local.rows()[0])
        two_blocks = [SlotRange(1, 0, 4, 0, 4), SlotRange(2, 0, 5, 0, 4)]
        large = link.write(HeldPermit(LEASE_ID, 1, FakeClock(), 0), two_blocks)
        small = link.write(permit(FakeClock()), [SlotRange(3, 0, 6, 0, 4)])
        assert not large.done()
        assert not small.done()
        assert not remote.rows()[6].any()
        go_on.set()
        num_bytes = [(await writing).num_bytes for writing in (large, small)]
        assert num_bytes == [2 * TINY_LAYOUT.block_bytes, TINY_LAYOUT.block_bytes]
        np.testing.assert_array_equal(remote.rows()[4:7], local.rows()[1:4])
        await asyncio.sleep(0)
        assert link.write(permit(FakeClock()), ONE_BLOCK).done()
        link._thread.shutdown()


async def test_a_push_that_nobody_waits_for_any_more_still_keeps_small_ones_waiting() -> None:
    entered, go_on = threading.Event(), threading.Event()

    class HeldPermit(WritePermit):
        def check(self) -> None:
            entered.set()
            assert go_on.wait(10)

    with pair() as (intake, writer, remote), HostMemory().fill_randomly(1) as local:
        target = Target("d0", RankOffer(intake.offer, None), TINY_LAYOUT, 16, "", WHOLE)
        link = LocalLink(local, host_blocks(local), [target], [WriterChoice(writer, None)])
        quick, link._most_quick_slots = link._most_quick_slots, 0
        held = link.write(HeldPermit(LEASE_ID, 1, FakeClock(), 0), ONE_BLOCK)
        link._most_quick_slots = quick
        assert await asyncio.to_thread(entered.wait, 10)
        held.cancel()
        await asyncio.sleep(0)
        small = link.write(permit(FakeClock()), [SlotRange(3, 0, 6, 0, 4)])
        assert not small.done()
        go_on.set()
        assert (await small).num_bytes == TINY_LAYOUT.block_bytes
        np.testing.assert_array_equal(remote.rows()[6], local.rows()[3])
        link._thread.shutdown()


def test_the_fence_waits_for_a_slice_that_is_under_way() -> None:
    with pair() as (intake, writer, remote), HostMemory().fill_randomly(1) as local:
        entered, go_on = threading.Event(), threading.Event()

        class StuckPermit(WritePermit):
            def check(self) -> None:
                entered.set()
                assert go_on.wait(10)

        stuck = StuckPermit(LEASE_ID, 1, FakeClock(), 0)
        thread = threading.Thread(
            target=writer.write, args=(stuck, a_source(local), ONE_BLOCK, WHOLE)
        )
        thread.start()
        assert entered.wait(10)
        assert not intake.fence(LEASE_ID, is_forced=False)
        assert not intake.fence(LEASE_ID, is_forced=True)
        go_on.set()
        thread.join(10)
        assert intake.fence(LEASE_ID, is_forced=False)
        np.testing.assert_array_equal(remote.rows()[3], local.rows()[0])


HOLD_LOCK = """
import os, sys
from kv_transfer import range_lock
fd = os.open(sys.argv[1], os.O_RDWR)
with range_lock.writing(fd, int(sys.argv[2])) as is_open:
    assert is_open
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_the_death_of_a_writer_in_the_middle_of_a_slice_raises_its_fence() -> None:
    with pair() as (intake, _, _):
        command = [sys.executable, "-c", HOLD_LOCK, intake.offer.path, str(LEASE_ID)]
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "locked\n"
            assert not intake.fence(LEASE_ID, is_forced=True)
            process.kill()
            process.wait(10)
        assert intake.fence(LEASE_ID, is_forced=False)


def test_writers_share_a_lease_and_the_fence_waits_for_the_last_of_them() -> None:
    with HostMemory() as memory, contextlib.ExitStack() as turns:
        fds = [os.open(f"/proc/self/fd/{memory.shared_fd}", os.O_RDWR) for _ in range(3)]
        owner, first, second = fds
        assert turns.enter_context(range_lock.writing(first, LEASE_ID))
        other = contextlib.ExitStack()
        assert other.enter_context(range_lock.writing(second, LEASE_ID))
        assert not range_lock.fence(owner, LEASE_ID)
        other.close()
        with range_lock.writing(second, LEASE_ID) as is_open:
            assert not is_open  # the gate is shut: no new turn, though the first one goes on
        assert not range_lock.fence(owner, LEASE_ID)
        turns.close()
        assert range_lock.fence(owner, LEASE_ID)
        assert range_lock.fence(owner, LEASE_ID)
        with range_lock.writing(first, LEASE_ID) as is_open:
            assert not is_open
        range_lock.unfence(owner, LEASE_ID)
        with range_lock.writing(first, LEASE_ID) as is_open:
            assert is_open
        for fd in fds:
            os.close(fd)


def test_leases_do_not_meet() -> None:
    with HostMemory() as memory:
        fds = [os.open(f"/proc/self/fd/{memory.shared_fd}", os.O_RDWR) for _ in range(2)]
        assert range_lock.fence(fds[0], 5)
        for lease_id in (4, 6):
            with range_lock.writing(fds[1], lease_id) as is_open:
                assert is_open
        with range_lock.writing(fds[1], 5) as is_open:
            assert not is_open
        os.close(fds[0])  # ends its locks
        with range_lock.writing(fds[1], 5) as is_open:
            assert is_open
        os.close(fds[1])


@pytest.mark.parametrize(
    "path",
    [
        "/proc/self/fd/3",
        "/proc/1/fd/3/..",
        "/proc/0/fd/3",
        "/proc/1/fd/-3",
        "/proc/1/fd/03",
        "/proc/1/fd/3\n",
        "/proc/99999999999/fd/3",
        "/proc/1/../etc/fd/3",
        "/dev/shm/x",
        "/etc/passwd",
        "",
        "/proc/1/fd/3\0",
    ],
)
def test_only_descriptors_of_a_process_are_opened(path: str) -> None:
    with pytest.raises(PeerUnavailableError, match="not a /proc"):
        ShmWriter(ShmOffer(path, 10, b"0" * 16), TINY_LAYOUT, 16, slice_bytes=1)


@pytest.mark.parametrize("nonce", [b"", b"0" * 16, b"0" * 17], ids=len)
def test_another_segments_nonce_is_refused(nonce: bytes) -> None:
    with HostMemory() as remote:
        intake = ShmIntake(remote)
        offer = replace(intake.offer, nonce=nonce)
        with pytest.raises(PeerUnavailableError, match="not the receiver's pool"):
            ShmWriter(offer, TINY_LAYOUT, 16, slice_bytes=1)
        intake.close()


@pytest.mark.parametrize("num_blocks", [17, 1 << 40], ids=["one-more", "huge"])
def test_a_pool_larger_than_its_file_is_refused(num_blocks: int) -> None:
    with HostMemory() as remote:
        intake = ShmIntake(remote)
        with pytest.raises(PeerUnavailableError, match="not a memory file of"):
            ShmWriter(intake.offer, TINY_LAYOUT, num_blocks, slice_bytes=1)
        offer = replace(intake.offer, num_bytes=1 << 60)
        with pytest.raises(PeerUnavailableError, match="not a memory file of"):
            ShmWriter(offer, TINY_LAYOUT, 16, slice_bytes=1)
        intake.close()


def test_pipes_and_files_on_disk_are_refused(tmp_path) -> None:
    num_bytes = 16 * TINY_LAYOUT.block_bytes + 16
    path = tmp_path / "pool"
    path.write_bytes(bytes(num_bytes))
    read_fd, write_fd = os.pipe()
    with path.open("r+b") as file:
        for fd in (file.fileno(), write_fd):
            offer = ShmOffer(f"/proc/{os.getpid()}/fd/{fd}", num_bytes, bytes(16))
            with pytest.raises(PeerUnavailableError, match="not a memory file"):
                ShmWriter(offer, TINY_LAYOUT, 16, slice_bytes=1)
    os.close(read_fd)
    os.close(write_fd)


def test_a_closed_descriptor_is_unavailable() -> None:
    with HostMemory() as remote:
        intake = ShmIntake(remote)
        offer = intake.offer
        intake.close()
    with pytest.raises(PeerUnavailableError, match="cannot open"):
        ShmWriter(offer, TINY_LAYOUT, 16, slice_bytes=1)


def test_a_pool_that_is_not_shared_offers_nothing() -> None:
    with DeviceMemory() as memory, pytest.raises(ValueError, match="not in shared memory"):
        ShmIntake(memory)
