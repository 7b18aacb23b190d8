"""Every data plane by name: what `test_kv_transfer_planes` holds a new one against."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest

from kv_transfer.blocks import HostBlocks
from kv_transfer.config import Checksums, DataPlane, TransferConfig
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank, WriterChoice, choose_writer
from kv_transfer.loopback import LoopbackIntake, LoopbackWriter
from kv_transfer.memory import KvMemory
from kv_transfer.nixl_agent import is_installed
from kv_transfer.sending_rank import Target
from kv_transfer.tcp_writer import tcp_writer
from tests.fakes.kv_memory import DeviceMemory, HostMemory
from tests.fakes.tls import SECURED

_NEEDS_NIXL = pytest.mark.skipif(not is_installed(), reason="NIXL is not installed")
_NAMES = (
    "shm",
    "shm-checked",
    "tcp",
    "tcp-secured",
    "tcp-several",
    "nixl",
    "nixl-checked",
    "loopback",
    "tcp-from-device",
    "tcp-to-device",
)
PLANES = [
    pytest.param(name, marks=_NEEDS_NIXL if name.startswith("nixl") else ()) for name in _NAMES
]
FAST = TransferConfig(lease_s=1.0, reserve_timeout_s=5.0, rpc_timeout_s=2.0, data_timeout_s=1.0)


@dataclass(slots=True)
class Ends:
    """Both ends of one data plane, not started."""

    name: str
    """As reports call it."""
    config: TransferConfig
    source: LocalSendingRank
    target: LocalReceivingRank


def memory_types(plane: str) -> tuple[type[HostMemory], type[HostMemory]]:
    """Of the sending and of the receiving end."""
    detail = plane.partition("-")[2]
    return (
        DeviceMemory if detail == "from-device" else HostMemory,
        DeviceMemory if detail == "to-device" else HostMemory,
    )


def ends_of(plane: str, local: KvMemory, remote: KvMemory, config: TransferConfig = FAST) -> Ends:
    """The ranks that a worker would have, set to the plane of that name."""
    name, _, detail = plane.partition("-")
    if name == "loopback":
        intake = LoopbackIntake(remote)

        def open_loopback(
            target: Target, config: TransferConfig, host: HostBlocks | None
        ) -> WriterChoice:
            return WriterChoice(LoopbackWriter(intake, slice_bytes=config.slice_bytes), None)

        return Ends(
            name,
            config,
            LocalSendingRank(local, config, open_writer=open_loopback),
            LocalReceivingRank(remote, config, other_planes=(intake,)),
        )
    config = replace(config, data_plane=DataPlane(name))
    if detail == "checked":
        config = replace(config, checksums=Checksums.ALWAYS)
    if detail == "secured":
        config = replace(config, **SECURED)
    opener = open_several if detail == "several" else choose_writer
    return Ends(
        name,
        config,
        LocalSendingRank(local, config, open_writer=opener),
        LocalReceivingRank(remote, config),
    )


def open_several(target: Target, config: TransferConfig, host: HostBlocks | None) -> WriterChoice:
    """Three connections, however few the cores of this machine."""
    offer = target.offer.tcp
    assert offer is not None
    address = (offer.host, offer.port)
    writer = tcp_writer(
        address, timeout_s=config.data_timeout_s, has_checksums=True, num_connections=3
    )
    return WriterChoice(writer, None)


@contextmanager
def memories(plane: str, *, num_blocks: int = 16) -> Iterator[tuple[HostMemory, HostMemory]]:
    """Pools of both ends, filled with different bytes."""
    local_type, remote_type = memory_types(plane)
    with (
        local_type(num_blocks).fill_randomly(seed=1) as local,
        remote_type(num_blocks).fill_randomly(seed=2) as remote,
    ):
        yield local, remote
