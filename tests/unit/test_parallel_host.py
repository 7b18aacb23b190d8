"""Ranks find out whether they share a host; here they are threads of one process."""

import os
import threading
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest
from torch._C._distributed_c10d import HashStore

from engine.parallel import CollectivesConfig, ParallelLayout
from engine.parallel import host as host_module
from engine.parallel.host import SharedHost, share_host
from engine.parallel.memory_file import FileAddress, MemoryFile

LAYOUT = ParallelLayout(tp=2)
CONFIG = CollectivesConfig(mailbox_bytes=64 * 1024, collective_buffer_bytes=64 * 1024)


def shared_by_both(configs: tuple[CollectivesConfig, ...] = (CONFIG, CONFIG)) -> list[bool]:
    """Whether rank 0 and rank 1 came to share memory."""
    store = HashStore()
    hosts: dict[int, SharedHost | None] = {}

    def join(rank: int) -> None:
        hosts[rank] = share_host(store, LAYOUT, rank, configs[rank])

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for host in hosts.values():
        if host is not None:
            host.close()
    return [hosts[rank] is not None for rank in range(2)]


def test_processes_of_one_host_share_memory() -> None:
    assert shared_by_both() == [True, True]


def test_containers_that_see_each_others_boot_id_only_talk_over_tcp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    offer = MemoryFile.offer

    def offer_another_process(file: MemoryFile) -> FileAddress:
        return msgspec.structs.replace(offer(file), pid=1, fd=9999)

    monkeypatch.setattr(MemoryFile, "offer", offer_another_process)
    assert shared_by_both() == [False, False]
    assert "ranks [0, 1] of this host talk over TCP" in caplog.text
    assert "rank 1: " in caplog.text


def test_without_the_library_ranks_talk_over_tcp(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise OSError("libisthmus.so is older than its sources")

    monkeypatch.setattr(host_module, "native_group_library", missing)
    assert shared_by_both() == [False, False]
    assert "libisthmus.so is older than its sources" in caplog.text


def test_ranks_of_other_settings_do_not_share(caplog: pytest.LogCaptureFixture) -> None:
    other = replace(CONFIG, mailbox_bytes=128 * 1024)
    assert shared_by_both((CONFIG, other)) == [False, False]
    assert "bytes, not" in caplog.text


def test_a_memory_file_is_seen_by_both() -> None:
    first = MemoryFile.create(4096)
    second = MemoryFile.open(first.offer(), 4096)
    first.close_file()
    assert first.address != second.address
    first.close()
    second.close()


def with_other_nonce(address: FileAddress) -> FileAddress:
    return msgspec.structs.replace(address, nonce=bytes(16))


def with_short_nonce(address: FileAddress) -> FileAddress:
    return msgspec.structs.replace(address, nonce=b"")


def with_other_size(address: FileAddress) -> FileAddress:
    return msgspec.structs.replace(address, num_bytes=1 << 40)


def with_no_file(address: FileAddress) -> FileAddress:
    return msgspec.structs.replace(address, fd=9999)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_other_nonce, "another file"),
        (with_short_nonce, "another file"),
        (with_other_size, "4096 bytes"),
        (with_no_file, "No such file"),
    ],
)
def test_a_file_that_is_not_the_one_is_refused(
    change: Callable[[FileAddress], FileAddress], words: str
) -> None:
    file = MemoryFile.create(4096)
    with pytest.raises(OSError, match=words):
        MemoryFile.open(change(file.offer()), 4096)
    file.close()


def test_a_device_is_not_opened() -> None:
    with open("/dev/null", "rb") as device:  # noqa: PTH123
        address = FileAddress(os.getpid(), device.fileno(), 4096, bytes(16))
        with pytest.raises(OSError, match="is not a memory file"):
            MemoryFile.open(address, 4096)
