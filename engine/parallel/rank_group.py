"""A worker's ranks, joined: their axes, and what ends them together."""

from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from types import MappingProxyType
from typing import Self, cast

import torch
from torch._C._distributed_c10d import PrefixStore, ProcessGroup, ProcessGroupGloo, Store
from torch.distributed import DistNetworkError, DistStoreError

from engine.errors import CollectiveTimeoutError, RankDeadError
from engine.parallel.axes import ParallelAxes
from engine.parallel.collectives import Collectives, CollectivesConfig
from engine.parallel.environment import RankEnvironment
from engine.parallel.host import SharedHost, share_host
from engine.parallel.host_address import agreed_address
from engine.parallel.layout import Axis, ParallelLayout
from engine.parallel.linked_collectives import LinkedCollectives
from engine.parallel.process_group import ProcessGroupCollectives
from engine.parallel.rank_links import open_links
from engine.parallel.store_watch import StoreWatch
from engine.parallel.traffic import Traffic
from engine.parallel.verdict import Verdict, VerdictKind


class RankGroup:
    """This process's membership in its worker; leave it with `close`, or as a context manager."""

    def __init__(
        self,
        layout: ParallelLayout,
        rank: int,
        collectives: Mapping[Axis, Collectives],
        *,
        config: CollectivesConfig,
        store: Store | None = None,
        host: SharedHost | None = None,
        watch: StoreWatch | None = None,
    ) -> None:
        """What `join_group` opened; the group closes it."""
        self.layout = layout
        self.rank = rank
        """Global."""
        self.traffic = Traffic()
        """Of all axes."""
        self.transports = MappingProxyType({axis: by.name for axis, by in collectives.items()})
        """How bytes travel ("shm", "gloo", "nccl"), for each axis of more than one rank."""
        self._collectives = collectives
        self._config = config
        self._store = store  # rank 0 may keep it for the others
        self._host = host
        self._watch = watch
        self.axes = ParallelAxes.from_layout(layout, rank, collectives, self.traffic)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def check(self) -> None:
        """Look whether all ranks are well; for a rank that is in no collective.

        Cheap enough for every second. A rank that is stopped shows in the next collective only.

        Raises:
            RankGroupError: what ended the group, as from a collective.
        """
        verdict = self._verdict()
        if verdict is None and self._host is not None:
            dead_rank = self._host.board.dead_rank()
            if dead_rank is not None:
                self._post(Verdict(VerdictKind.DEAD, dead_rank))
                verdict = self._verdict()
        if verdict is not None:
            raise verdict.error("check", self._config.collective_timeout_s)

    def abort(self, reason: str) -> None:
        """Call the group off: every rank's collectives raise CollectiveAbortedError.

        Any thread may call this. The first trouble counts; an abort after it changes nothing.
        """
        self._post(Verdict(VerdictKind.ABORTED, self.rank, reason))

    def close(self) -> None:
        """Leave; ranks that wait for this one in a collective get an error."""
        with ExitStack() as stack:
            if self._host is not None:
                stack.callback(self._host.close)
            if self._watch is not None:
                stack.callback(self._watch.close)
            for collectives in self._collectives.values():
                stack.callback(collectives.close)
            self._collectives = {}
            self._host = self._watch = self._store = None

    def _verdict(self) -> Verdict | None:
        if self._watch is not None:
            return self._watch.verdict()
        return None if self._host is None else self._host.board.verdict()

    def _post(self, verdict: Verdict) -> None:
        if self._host is not None:
            self._host.board.post(verdict)
        if self._watch is not None:
            self._watch.post(verdict)


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
        device: where the tensors are; CPU by default. With CUDA, all axes but the world's use NCCL.

    Raises:
        RankGroupError: a rank did not come, or died before all were there.
        ValueError: the layout has another number of ranks than the environment; both are named. Or
            it is interleaved, on CUDA.
    """
    config = config or CollectivesConfig()
    if environment is None:
        if layout.num_ranks > 1:
            raise ValueError(
                f"the layout {layout} has {layout.num_ranks} ranks, but RANK is not set: start "
                f"this program with torchrun --nproc-per-node {layout.num_ranks}, or set RANK, "
                "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT"
            )
        return RankGroup(layout, 0, {}, config=config)
    environment.check_layout(layout)
    if layout.num_ranks == 1:
        return RankGroup(layout, 0, {}, config=config)
    device = device or torch.device("cpu")
    if layout.interleave > 1 and device.type == "cuda":
        raise ValueError(
            f"{layout} sends both ways between stages, and NCCL would wait for one before the "
            f"other; use pp={layout.pp} without interleave on CUDA"
        )
    store = environment.open_store(config.join_timeout_s)
    keeper = None if environment.is_store_elsewhere else 0
    try:
        group = _joined(layout, environment, store, keeper, config, device)
    except DistStoreError as error:  # the store waits for what other ranks say
        text = f"not all ranks came within {config.join_timeout_s:g} s: {_first_line(error)}"
        raise CollectiveTimeoutError(text, rank=None, operation="join") from error
    except DistNetworkError as error:
        text = f"the ranks' store was lost before all had come: {_first_line(error)}"
        raise RankDeadError(text, rank=keeper, operation="join") from error
    group.axes.world.barrier()  # nobody leaves, and takes the store along, before all are there
    return group


def _joined(
    layout: ParallelLayout,
    environment: RankEnvironment,
    store: Store,
    keeper: int | None,
    config: CollectivesConfig,
    device: torch.device,
) -> RankGroup:
    rank = environment.rank
    host = share_host(store, layout, rank, config) if config.has_shared_memory else None
    address = agreed_address(
        store, rank, layout.num_ranks, master_address=environment.master_address
    )
    watch: StoreWatch | None = None
    collectives: dict[Axis, Collectives] = {}
    for axis in Axis:
        if layout.size(axis) == 1:
            continue
        is_host_memory = axis is Axis.WORLD or device.type == "cpu"
        shared = host.collectives(axis) if host is not None and is_host_memory else None
        if shared is not None:
            collectives[axis] = shared
            continue
        if watch is None:
            watch = StoreWatch(
                _own_connection(store),
                rank,
                layout.num_ranks,
                keeper=keeper,
                board=None if host is None else host.board,
            )
        ranks = layout.group(axis, rank)
        group_store = PrefixStore(f"{axis.value}/{ranks[0]}", store)
        timeout_s, index = config.collective_timeout_s, ranks.index(rank)
        parts = (group_store, index, len(ranks), timedelta(seconds=timeout_s))
        title = axis.value
        if is_host_memory:
            links = open_links(
                group_store,
                index,
                len(ranks),
                own_address=address,
                timeout_s=config.join_timeout_s,
            )
            collectives[axis] = LinkedCollectives(
                _gloo(*parts, own_address=address),
                links,
                ranks,
                rank,
                watch,
                title=title,
                timeout_s=timeout_s,
                is_probed=axis is Axis.TP,
            )
        else:
            collectives[axis] = ProcessGroupCollectives(
                "nccl",
                _nccl(*parts),
                ranks,
                rank,
                watch,
                title=title,
                device=device,
                timeout_s=timeout_s,
            )
    return RankGroup(layout, rank, collectives, config=config, store=store, host=host, watch=watch)


def _first_line(error: Exception) -> str:
    """Of torch's errors, which have many."""
    return str(error).partition("\n")[0]


def _own_connection(store: Store) -> Store:
    """A second connection: a call that waits keeps the first one busy."""
    clone: Store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs
    return clone


def _gloo(
    store: Store, index: int, size: int, timeout: timedelta, *, own_address: str
) -> ProcessGroup:
    """By itself it would take what the name of this host stands for, maybe a loopback address."""
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
    options._devices = [ProcessGroupGloo.create_device(hostname=own_address)]  # noqa: SLF001
    options._timeout = timeout  # noqa: SLF001
    return cast("ProcessGroup", ProcessGroupGloo(store, index, size, options))


def _nccl(store: Store, index: int, size: int, timeout: timedelta) -> ProcessGroup:
    from torch._C._distributed_c10d import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = timeout  # noqa: SLF001  # the only way to set it
    return cast("ProcessGroup", ProcessGroupNCCL(store, index, size, options))
