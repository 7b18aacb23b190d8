"""A receiving rank in this process: the data planes into its pool."""

import asyncio
import contextlib
from collections.abc import Mapping, Sequence

from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.memory import KvMemory
from kv_transfer.offer import RankOffer
from kv_transfer.plane import KvIntake, WriteWindow
from kv_transfer.shm import ShmIntake
from kv_transfer.tcp_intake import TcpIntake

FORCE_AFTER_S = 0.5
"""A writer in the middle of a slice gets this long before it is cut off."""


class LocalReceivingRank:
    """Lets writers into `memory`."""

    def __init__(
        self, memory: KvMemory, config: TransferConfig, *, other_planes: Sequence[KvIntake] = ()
    ) -> None:
        self._memory = memory
        self._config = config
        self._other_planes = other_planes
        self.shm: ShmIntake | None = None
        self.tcp: TcpIntake | None = None

    @property
    def dropped(self) -> Mapping[str, int]:
        return {} if self.tcp is None else dict(self.tcp.dropped)

    async def start(self, epoch: int) -> RankOffer:
        wanted = self._config.data_plane
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            if wanted is not DataPlane.TCP and self._memory.shared_fd is not None:
                self.shm = ShmIntake(self._memory)
            if wanted is not DataPlane.SHM:
                self.tcp = TcpIntake(self._memory, epoch=epoch, config=self._config)
            if not self._planes:
                raise ValueError("data_plane is shm but the KV pool is not in shared memory")
            undo.pop_all()
        return RankOffer(
            shm=self.shm.offer if self.shm else None, tcp=self.tcp.offer if self.tcp else None
        )

    async def open(self, window: WriteWindow) -> None:
        for plane in self._planes:
            plane.open(window)

    async def fence(self, lease_id: int) -> None:
        pause_s = waited_s = 0.001
        for plane in self._planes:
            while not plane.fence(lease_id, is_forced=waited_s > FORCE_AFTER_S):
                await asyncio.sleep(pause_s)
                waited_s += pause_s
                pause_s = min(2 * pause_s, 0.05)

    async def forget(self, lease_ids: Sequence[int]) -> None:
        for plane in self._planes:
            for lease_id in lease_ids:
                plane.forget(lease_id)

    async def stop(self) -> None:
        self._close()

    @property
    def _planes(self) -> list[KvIntake]:
        return [plane for plane in (self.shm, self.tcp, *self._other_planes) if plane is not None]

    def _close(self) -> None:
        for plane in self._planes:
            plane.close()
        self.shm = self.tcp = None
