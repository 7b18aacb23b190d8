"""The command line and environment of each process of a mesh on one machine."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from deploy.launcher import redis_server
from deploy.launcher.child_process import ChildSpec, StartError, ready_file_written
from deploy.launcher.core_plan import thread_environment, usable_cores
from deploy.launcher.mesh_config import MeshConfig
from deploy.launcher.ready_file import ReadyRecord
from engine.runtime.core_share import split_cores

HOST = "127.0.0.1"
_KILL_AFTER_S = 5.0
"""After the time that a service was given to drain."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshPlace:
    """Where the processes of one mesh meet."""

    config: MeshConfig
    run_dir: Path
    redis_url: str
    core_share_fd: int
    reserve_port: Callable[[], int]
    """A port of HOST that nobody else gets while the mesh is up."""


def redis_spec(place: MeshPlace) -> ChildSpec:
    """The private Redis.

    Raises:
        StartError: this machine has no server binary.
    """
    binary = redis_server.find_redis_server()
    if binary is None:
        raise StartError(
            "no redis-server was found: install Debian's package redis-server, or name a running"
            " one with --redis-url"
        )

    async def answers(pid: int) -> ReadyRecord:
        await redis_server.wait_until_answering(place.run_dir)
        return ReadyRecord(role="redis", pid=pid, addresses={"redis": place.redis_url})

    return ChildSpec(
        name="redis",
        role="redis",
        command=lambda _: redis_server.redis_command(binary, place.run_dir),
        environments=lambda: [dict(os.environ)],
        wait_ready=answers,
        ready_timeout_s=10.0,
        drain_s=_KILL_AFTER_S,
    )


def worker_specs(place: MeshPlace) -> list[ChildSpec]:
    """Prefill workers, then decode workers, each rank with its home cores."""
    config = place.config
    homes = split_cores(usable_cores(), config.num_ranks)
    specs = []
    first_slot = 0
    for name in config.worker_names:
        role = name.partition("-")[0]
        layout = config.parallel(role)
        slots = range(first_slot, first_slot + layout.num_ranks)
        first_slot = slots.stop
        flags = (
            *("--host", HOST, "--port", "0", "--device", config.device, *_dtypes(config)),
            *("--parallel", str(layout), "--core-share-fd", str(place.core_share_fd)),
        )
        ranks = [_rank_environment(slot, homes[slot]) for slot in slots]
        specs.append(
            _service_spec(
                place,
                name=name,
                role=role,
                flags=_always(flags),
                environments=_group_environments(place, ranks),
                inherited_fds=(place.core_share_fd,),
            )
        )
    return specs


def store_spec(place: MeshPlace) -> ChildSpec:
    """The store of KV blocks; it has no core of its own, since it copies now and then."""
    return _service_spec(
        place,
        name="store",
        role="store",
        flags=_always(("--host", HOST, "--port", "0", *_dtypes(place.config))),
        environments=lambda: [thread_environment(1)],
        inherited_fds=(),
    )


def _dtypes(config: MeshConfig) -> Sequence[str]:
    return ("--dtype", config.dtype, "--kv-dtype", config.kv_dtype)


def _rank_environment(slot: int, home: Sequence[int]) -> dict[str, str]:
    """What differs among the ranks of a worker, besides their numbers."""
    return {
        **thread_environment(len(home)),
        "ISTHMUS_WORKER__HOME_CORES": ",".join(map(str, home)),
        "ISTHMUS_WORKER__CORE_SHARE_SLOT": str(slot),
    }


def _group_environments(
    place: MeshPlace, ranks: Sequence[Mapping[str, str]]
) -> Callable[[], Sequence[Mapping[str, str]]]:
    """Environments by which the ranks of a worker find each other; a worker of one rank is alone.

    The port at which they meet is kept from others as long as the mesh is up.
    """
    if len(ranks) == 1:
        return lambda: ranks
    port = place.reserve_port()
    size = str(len(ranks))
    common = {"WORLD_SIZE": size, "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
    numbered = [
        {**common, **rank, "RANK": str(index), "LOCAL_RANK": str(index), "LOCAL_WORLD_SIZE": size}
        for index, rank in enumerate(ranks)
    ]
    return lambda: numbered


def gateway_spec(place: MeshPlace) -> ChildSpec:
    """The gateway; started again, it listens on the ports that clients know."""
    config = place.config

    def flags(ready: ReadyRecord | None) -> Sequence[str]:
        http, grpc = str(config.http_port), str(config.grpc_port)
        if ready is not None:
            http, grpc = (ready.addresses[kind].rpartition(":")[2] for kind in ("http", "grpc"))
        return ("--host", HOST, "--http-port", http, "--grpc-port", grpc)

    return _service_spec(
        place,
        name="gateway",
        role="gateway",
        flags=flags,
        environments=lambda: [thread_environment(1)],
        inherited_fds=(),
    )


def _always(flags: Sequence[str]) -> Callable[[ReadyRecord | None], Sequence[str]]:
    return lambda _: flags


def _service_spec(
    place: MeshPlace,
    *,
    name: str,
    role: str,
    flags: Callable[[ReadyRecord | None], Sequence[str]],
    environments: Callable[[], Sequence[Mapping[str, str]]],
    inherited_fds: tuple[int, ...],
) -> ChildSpec:
    config, ready_file = place.config, place.run_dir / f"{name}.json"

    def command(ready: ReadyRecord | None) -> Sequence[str]:
        return (
            *(sys.executable, *config.programs[role]),
            *("--model", config.model, "--redis-url", place.redis_url),
            *("--ready-file", str(ready_file), "--drain-grace-s", str(config.drain_grace_s)),
            *flags(ready),
        )

    return ChildSpec(
        name=name,
        role=role,
        command=command,
        environments=lambda: [{**os.environ, **each} for each in environments()],
        inherited_fds=inherited_fds,
        wait_ready=lambda pid: ready_file_written(ready_file, pid),
        ready_timeout_s=config.ready_timeout_s,
        drain_s=config.drain_grace_s + _KILL_AFTER_S,
    )
