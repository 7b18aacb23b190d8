"""A worker's ranks, joined: their axes and what ends them together."""

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Self, cast

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, ProcessGroupGloo, Store

from engine.parallel.axes import ParallelAxes
from engine.parallel.collectives import Collectives, CollectivesConfig
from engine.parallel.environment import RankEnvironment
from engine.parallel.host import SharedHost, share_host
from engine.parallel.layout import Axis, ParallelLayout
from engine.parallel.process_group import ProcessGroupCollectives
from engine.parallel.traffic import Traffic


class RankGroup:
    """This process's membership in its worker; leave it with `close`, or as a context manager."""

    def __init__(
        self,
        layout: ParallelLayout,
        rank: int,
        collectives: Mapping[Axis, Collectives],
        host: SharedHost | None = None,
    ) -> None:
        self.layout = layout
        self.rank = rank
        """Global."""
        self.traffic = Traffic()
        """Of all axes."""
        self.transports = MappingProxyType({axis: by.name for axis, by in collectives.items()})
        """How bytes travel, for each axis of more than one rank."""
        self._collectives = collectives
        self._host = host
        self.axes = ParallelAxes.from_layout(layout, rank, collectives, self.traffic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave; ranks that wait for this one in a collective get an error."""
        for collectives in self._collectives.values():
            collectives.close()
        if self._host is not None:
            self._host.close()


def join_group(
    layout: ParallelLayout,
    environment: RankEnvironment | None = None,
    *,
    config: CollectivesConfig | None = None,
    device: torch.device | None = None,
) -> RankGroup:
    """Meet the other ranks of the layout and open the ways between them.

    Every rank calls this with the same layout and configuration.

    Args:
        layout: one rank needs no environment.
        environment: this process's place, from `RankEnvironment.read`.
        config: time-outs and buffers.
        device: where the tensors are; CPU by default.

    Raises:
        ValueError: the layout has another number of ranks than the environment; both are named.
    """
    config = config or CollectivesConfig()
    if environment is None:
        if layout.num_ranks > 1:
            raise ValueError(
                f"the layout {layout} has {layout.num_ranks} ranks, but RANK is not set: start "
                f"this program with torchrun --nproc-per-node {layout.num_ranks}, or set RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        return RankGroup(layout, 0, {})
    environment.check_layout(layout)
    if layout.num_ranks == 1:
        return RankGroup(layout, 0, {})
    store = environment.open_store(config.join_timeout_s)
    host = share_host(store, layout, environment.rank, config)
    collectives: dict[Axis, Collectives] = {}
    for axis in Axis:
        if layout.size(axis) > 1:
            shared = host.collectives(axis) if host is not None else None
            collectives[axis] = shared or _gloo(store, layout, axis, environment.rank, config)
    return RankGroup(layout, environment.rank, collectives, host)


def _gloo(
    store: Store, layout: ParallelLayout, axis: Axis, rank: int, config: CollectivesConfig
) -> Collectives:
    group = layout.group(axis, rank)
    index = group.index(rank)
    gloo = ProcessGroupGloo(
        PrefixStore(f"{axis.value}/{group[0]}", store),
        index,
        len(group),
        timedelta(seconds=config.collective_timeout_s),
    )
    return ProcessGroupCollectives(
        "gloo",
        cast("ProcessGroup", gloo),
        index,
        len(group),
        timeout_s=config.collective_timeout_s,
    )
