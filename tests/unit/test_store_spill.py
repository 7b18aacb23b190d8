"""Blocks on disk: whole or not at all, within bounds, found again by the next store."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from kv_transfer.store import spill as spill_module
from kv_transfer.store.spill import CHECKSUM_BYTES, Spill

BLOCK_BYTES = 64


def name(index: int) -> bytes:
    return bytes([index]) * 32


def content(index: int) -> bytes:
    return bytes([index, 255 - index]) * (BLOCK_BYTES // 2)


def spill_of(folder: Path, *, num_blocks: int = 4) -> Spill:
    return Spill(
        folder, block_bytes=BLOCK_BYTES, max_bytes=num_blocks * (BLOCK_BYTES + CHECKSUM_BYTES)
    )


def put(spill: Spill, *indices: int) -> None:
    for index in indices:
        spill.put(name(index), memoryview(content(index)))


def slow_disk(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """The thread tells when it has begun to write, and goes on when it is told to."""
    entered, gate = threading.Event(), threading.Event()
    make_room = Spill._make_room

    def slow(spill: Spill, num_new: int) -> None:
        if num_new:
            entered.set()
            gate.wait(10)
        make_room(spill, num_new)

    monkeypatch.setattr(Spill, "_make_room", slow)
    return entered, gate


def test_blocks_come_back_as_they_were_and_outlive_the_store(tmp_path):
    with spill_of(tmp_path) as spill:
        put(spill, 1, 2)
        assert spill.read(name(1)) == content(1), "on disk or on the way there"
        assert spill.read(name(3)) is None
    with spill_of(tmp_path) as spill:
        assert name(1) in spill
        assert spill.num_bytes == 2 * (BLOCK_BYTES + CHECKSUM_BYTES)
        assert [spill.read(name(index)) for index in (1, 2)] == [content(1), content(2)]


def test_least_recently_used_files_go_when_the_bound_is_reached(tmp_path):
    with spill_of(tmp_path) as spill:
        put(spill, 1, 2, 3, 4)
    with spill_of(tmp_path) as spill:
        assert spill.read(name(1)) == content(1)
        put(spill, 5)
    with spill_of(tmp_path) as spill:
        kept = {index for index in range(1, 6) if name(index) in spill}
        assert len(kept) == 4
        assert {1, 5} <= kept
    assert len(list(tmp_path.glob("*.kv"))) == 4


def test_smaller_bound_than_last_time_removes_files_at_start(tmp_path):
    with spill_of(tmp_path) as spill:
        put(spill, 1, 2, 3, 4)
    with spill_of(tmp_path, num_blocks=2) as spill:
        assert spill.num_bytes == 2 * (BLOCK_BYTES + CHECKSUM_BYTES)
    assert len(list(tmp_path.glob("*.kv"))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda data: data[:-1] + bytes([data[-1] ^ 1]), id="one bit"),
        pytest.param(lambda data: data[:-1], id="cut short"),
        pytest.param(lambda data: b"", id="empty"),
    ],
)
def test_damaged_file_is_not_believed_and_removed(tmp_path, damage):
    with spill_of(tmp_path) as spill:
        put(spill, 1)
    with spill_of(tmp_path) as spill:
        path = tmp_path / f"{name(1).hex()}.kv"
        path.write_bytes(damage(path.read_bytes()))
        assert spill.read(name(1)) is None
        assert spill.dropped == {"damaged": 1}
        assert name(1) not in spill
        assert not path.exists()


def test_file_of_another_block_is_found_out(tmp_path):
    with spill_of(tmp_path) as spill:
        put(spill, 1)
    (tmp_path / f"{name(1).hex()}.kv").rename(tmp_path / f"{name(2).hex()}.kv")
    with spill_of(tmp_path) as spill:
        assert spill.read(name(2)) is None


def test_file_that_vanished_is_counted(tmp_path):
    with spill_of(tmp_path) as spill:
        put(spill, 1)
    with spill_of(tmp_path) as spill:
        (tmp_path / f"{name(1).hex()}.kv").unlink()
        assert spill.read(name(1)) is None
        assert spill.dropped == {"unreadable": 1}


def test_what_a_crash_left_half_written_is_removed(tmp_path):
    (tmp_path / f"{name(1).hex()}.part").write_bytes(b"x")
    (tmp_path / f"{name(2).hex()}.kv").write_bytes(b"too short")
    (tmp_path / "notes.txt").write_text("not ours")
    with spill_of(tmp_path) as spill:
        assert spill.num_bytes == 0
    assert {path.name for path in tmp_path.iterdir()} == {"lock", "notes.txt"}


def test_slow_disk_loses_what_was_evicted_first_and_counts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(spill_module, "MAX_WAITING_BYTES", 3 * BLOCK_BYTES)
    entered, gate = slow_disk(monkeypatch)
    with spill_of(tmp_path) as spill:
        put(spill, 1)
        assert entered.wait(10)
        put(spill, 2, 3, 4, 5)  # of one sequence: the tail first, the head last
        assert spill.dropped == {"disk_too_slow": 2}
        assert [spill.read(name(index)) is None for index in range(1, 6)] == [
            *(False, True, True, False, False)
        ]
        gate.set()
    assert {path.stem for path in tmp_path.glob("*.kv")} == {name(i).hex() for i in (1, 4, 5)}


def test_block_that_is_dropped_and_comes_again_is_written_once(tmp_path, monkeypatch):
    monkeypatch.setattr(spill_module, "MAX_WAITING_BYTES", 2 * BLOCK_BYTES)
    entered, gate = slow_disk(monkeypatch)
    with spill_of(tmp_path) as spill:
        put(spill, 1)
        assert entered.wait(10)
        put(spill, 2, 3, 2)
        gate.set()
    assert spill.dropped == {"disk_too_slow": 2}
    with spill_of(tmp_path) as spill:
        assert [spill.read(name(index)) for index in (1, 2)] == [content(1), content(2)]


def test_nobody_else_may_read_what_is_spilled(tmp_path):
    folder = tmp_path / "store" / "spill"
    umask = os.umask(0)
    try:
        with spill_of(folder) as spill:
            put(spill, 1)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    files = {path.suffix: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert files == {"": 0o600, ".kv": 0o600}


def test_disk_that_refuses_is_counted_and_stops_nothing(tmp_path):
    folder = tmp_path / "spill"
    with spill_of(folder) as spill:
        (folder / f"{name(1).hex()}.part").mkdir()  # its name is taken: writing fails
        put(spill, 1, 2)
    assert spill.dropped == {"write_failed": 1}
    assert name(1) not in spill
    (folder / f"{name(1).hex()}.part").rmdir()
    assert [path.stem for path in folder.glob("*.kv")] == [name(2).hex()]


def test_full_disk_keeps_no_unfinished_files(tmp_path, monkeypatch):
    def full(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with spill_of(tmp_path) as spill:
        put(spill, 1, 2)
    assert spill.dropped == {"write_failed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_folder_belongs_to_one_store(tmp_path):
    with (
        spill_of(tmp_path),
        pytest.raises(ValueError, match="is another store's"),
        spill_of(tmp_path),
    ):
        pass
    with spill_of(tmp_path):
        pass


def test_bounds_and_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(ValueError, match="spill_bytes of 79 hold no block of 64 bytes"):
        Spill(tmp_path, block_bytes=BLOCK_BYTES, max_bytes=79)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="spill_dir"), spill_of(tmp_path / "file" / "below"):
        pass
