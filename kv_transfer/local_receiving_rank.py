"""A receiving rank in this process: the data planes into its pool."""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from engine.errors import PeerUnavailableError
from kv_transfer import nixl_agent
from kv_transfer.config import DataPlane, TransferConfig, address_from, join_address
from kv_transfer.memory import KvMemory
from kv_transfer.nixl_intake import NixlIntake
from kv_transfer.offer import RankOffer
from kv_transfer.plane import KvIntake, WriteWindow
from kv_transfer.shm import ShmIntake
from kv_transfer.tcp_intake import TcpIntake

logger = logging.getLogger(__name__)

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
        self.nixl: NixlIntake | None = None

    @property
    def dropped(self) -> Mapping[str, int]:
        dropped: Counter[str] = Counter()
        for plane in (self.tcp, self.nixl):
            if plane is not None:
                dropped.update(plane.dropped)
        return dropped

    async def start(self, epoch: int) -> RankOffer:
        wanted = self._config.data_plane
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            if wanted in (DataPlane.AUTO, DataPlane.SHM) and self._memory.shared_fd is not None:
                self.shm = ShmIntake(self._memory)
            if wanted in (DataPlane.AUTO, DataPlane.TCP):
                self.tcp = TcpIntake(self._memory, epoch=epoch, config=self._config)
            if wanted is DataPlane.NIXL or (wanted is DataPlane.AUTO and self._may_use_nixl()):
                try:
                    self.nixl = await asyncio.to_thread(self._open_nixl, epoch)
                except PeerUnavailableError as error:
                    if wanted is DataPlane.NIXL:
                        raise
                    logger.warning("nixl is not offered: %s", error)
            if not self._planes:
                raise ValueError("data_plane is shm but the KV pool is not in shared memory")
            undo.pop_all()
        return RankOffer(
            shm=self.shm.offer if self.shm else None,
            tcp=self.tcp.offer if self.tcp else None,
            nixl=self.nixl.offer if self.nixl else None,
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
        planes = (self.shm, self.tcp, self.nixl, *self._other_planes)
        return [plane for plane in planes if plane is not None]

    def _may_use_nixl(self) -> bool:
        has_all = nixl_agent.is_installed() and nixl_agent.has_rdma()
        return has_all and self._memory.host_bytes is not None and not self._config.is_secured

    def _open_nixl(self, epoch: int) -> NixlIntake:
        host, port = address_from(self._config.data_address)
        if port and self.tcp is not None:
            port += 1
        return NixlIntake(
            self._memory, epoch=epoch, config=self._config, address=join_address(host, port)
        )

    def _close(self) -> None:
        for plane in self._planes:
            plane.close()
        self.shm = self.tcp = self.nixl = None
