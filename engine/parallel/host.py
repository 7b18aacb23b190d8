"""Which ranks share this host, and the memory that they share.

Ranks are of one host when they say the same boot id *and* every one of them could map the memory
file of the first: containers of one machine may see each other's boot id but not their processes.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import msgspec
from torch._C._distributed_c10d import Store

from engine.parallel.collectives import CollectivesConfig
from engine.parallel.host_board import HostBoard
from engine.parallel.layout import Axis, ParallelLayout
from engine.parallel.memory_file import FileAddress, MemoryFile
from engine.parallel.native_group import NativeGroupLibrary, native_group_library
from engine.parallel.shared_memory import SharedMemoryCollectives, group_bytes

logger = logging.getLogger(__name__)

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PAGE_BYTES = 4096
SPIN_S = 20e-6
"""How long a wait keeps its core, and the interpreter lock, where each rank has a core."""


class RankPlace(msgspec.Struct, frozen=True):
    """What a rank tells the others about itself."""

    boot_id: str
    pid: int
    cores: frozenset[int]
    """That it may run on."""


class SharedHost:
    """The memory that this host's ranks share: a board, then a region for each of their groups."""

    def __init__(
        self,
        layout: ParallelLayout,
        rank: int,
        places: Mapping[int, RankPlace],
        config: CollectivesConfig,
        library: NativeGroupLibrary,
    ) -> None:
        """`places` by global rank, of the ranks on this host; nothing is mapped yet."""
        self._layout = layout
        self._rank = rank
        self._pids = {other: place.pid for other, place in places.items()}
        num_cores = len(frozenset[int]().union(*(place.cores for place in places.values())))
        self._spin_s = SPIN_S if len(places) <= num_cores else 0.0
        self._config = config
        self._library = library
        self._offsets: dict[tuple[int, ...], dict[Axis, int]] = {}
        board_bytes = library.board_bytes(len(places))
        self.num_bytes = -(-board_bytes // _PAGE_BYTES) * _PAGE_BYTES
        for axis in Axis:
            for group in layout.groups(axis):
                if len(group) > 1 and places.keys() >= set(group):
                    self._offsets.setdefault(group, {})[axis] = self.num_bytes
                    self.num_bytes += group_bytes(library, config, len(group))
        self._file: MemoryFile | None = None
        self._board: HostBoard | None = None

    @property
    def board(self) -> HostBoard:
        assert self._board is not None, "not mapped yet"
        return self._board

    def create(self) -> FileAddress:
        """Make the memory (first rank of the host); say where it is."""
        self._adopt(MemoryFile.create(self.num_bytes))
        assert self._file is not None, "adopted"
        return self._file.offer()

    def map(self, address: FileAddress) -> None:
        """Map what the first rank made.

        Raises:
            OSError: it cannot be mapped, or a rank is gone.
        """
        self._adopt(MemoryFile.open(address, self.num_bytes))

    def settle(self) -> None:
        """Every rank has mapped the memory: nobody else will."""
        assert self._file is not None, "not mapped yet"
        self._file.close_file()

    def collectives(self, axis: Axis) -> SharedMemoryCollectives | None:
        """This rank's group of an axis; None when it has ranks on other hosts."""
        group = self._layout.group(axis, self._rank)
        offset = self._offsets.get(group, {}).get(axis)
        if offset is None:
            return None
        assert self._file is not None, "not mapped yet"
        return SharedMemoryCollectives(
            self._library,
            self.board,
            self._file.address + offset,
            group,
            self._rank,
            title=axis.value,
            config=self._config,
            spin_s=self._spin_s,
        )

    def close(self) -> None:
        """Leave; the groups must be closed before."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._file is not None:
            self._file.close()
            self._file = None

    def _adopt(self, file: MemoryFile) -> None:
        self._file = file
        self._board = HostBoard(self._library, file.address, self._rank, self._pids)


def share_host(
    store: Store, layout: ParallelLayout, rank: int, config: CollectivesConfig
) -> SharedHost | None:
    """Find the ranks of this host and share memory with them; every rank must call this.

    Returns:
        None where a rank is alone on its host, or where one of them could not: the reason is
        logged, and all of them go without.
    """
    places = _exchange_places(store, rank, layout.num_ranks)
    boot_id = places[rank].boot_id
    here = {other: place for other, place in places.items() if place.boot_id == boot_id}
    if len(here) == 1:
        return None
    host, reason = None, ""
    try:
        host = SharedHost(layout, rank, here, config, native_group_library())
        _map(host, store, rank, first=min(here))
    except (OSError, MemoryError, msgspec.MsgspecError) as error:
        reason = f"rank {rank}: {error}"
        if rank == min(here):
            store.set(f"memory/{rank}", "")
    store.set(f"mapped/{rank}", reason)
    reasons = [store.get(f"mapped/{other}").decode() for other in sorted(here)]
    if any(reasons):
        logger.warning(
            "ranks %s of this host talk over TCP, for they cannot share memory: %s",
            sorted(here),
            "; ".join(filter(None, reasons)),
        )
        if host is not None:
            host.close()
        return None
    assert host is not None, "no reason was given"
    host.settle()
    return host


def _exchange_places(store: Store, rank: int, num_ranks: int) -> dict[int, RankPlace]:
    own = RankPlace(_BOOT_ID.read_text().strip(), os.getpid(), frozenset(os.sched_getaffinity(0)))
    store.set(f"place/{rank}", msgspec.json.encode(own).decode())
    return {
        other: msgspec.json.decode(store.get(f"place/{other}"), type=RankPlace)
        for other in range(num_ranks)
    }


def _map(host: SharedHost, store: Store, rank: int, first: int) -> None:
    if rank == first:
        store.set(f"memory/{rank}", msgspec.json.encode(host.create()).decode())
        return
    data = store.get(f"memory/{first}")
    if not data:
        raise OSError(f"rank {first} made no memory")
    host.map(msgspec.json.decode(data, type=FileAddress))
