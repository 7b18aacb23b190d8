"""A mesh on one machine: private Redis, workers and gateway as child processes of this one."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.launcher import programs, redis_server
from deploy.launcher.child_process import ChildProcess, ChildSpec, StartError
from deploy.launcher.free_port import check_port, reserve_port
from deploy.launcher.mesh_config import MeshConfig
from deploy.launcher.pool_view import pools_seen
from deploy.launcher.ready_file import ProcessState, check_state_file, write_state_file
from deploy.launcher.run_directory import STATE_FILE, run_directory
from engine.runtime.core_share import create_core_share

_POOLS_SEEN_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class MeshEvents:
    """What the launcher tells whoever shows its progress."""

    on_started: Callable[[str], None]
    on_ready: Callable[[str], None]
    on_output: Callable[[str, str], None]
    """Name of the process, one line that it printed."""


class Mesh:
    """The processes of a mesh that is up; made by `running_mesh`."""

    def __init__(self, config: MeshConfig, redis_url: str, state_files: Sequence[Path]) -> None:
        self.config = config
        self.redis_url = redis_url
        self.children: Sequence[ChildProcess] = ()
        self.start_s = 0.0
        """Wall time from the first process's start until a request can be answered."""
        self._state_files = state_files
        self._is_up = False

    def states(self) -> list[ProcessState]:
        return [state for child in self.children if (state := child.state()) is not None]

    def address(self, role: str, kind: str) -> str:
        """The `kind` ("grpc", "http", "metrics") address of the first process of this role."""
        return next(state.addresses[kind] for state in self.states() if state.role == role)

    def came_up(self, start_s: float) -> None:
        """From now on the state files follow what happens."""
        self.start_s = start_s
        self._is_up = True
        self.write_state()

    def write_state(self) -> None:
        """Write who serves now; nothing while the mesh still starts."""
        for path in self._state_files if self._is_up else ():
            write_state_file(path, self.states())

    def remove_state(self) -> None:
        for path in self._state_files:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def running_mesh(
    config: MeshConfig, events: MeshEvents, *, hurry: asyncio.Event
) -> AsyncIterator[Mesh]:
    """Start every process, yield once requests can be answered, and keep all up inside the block.

    On exit the gateway goes first, then the workers, then Redis. Nothing is left behind however
    the block ends; should this process be killed, the kernel kills its children.

    Args:
        config: what to start.
        events: told of each step, for whoever shows progress.
        hurry: set by a second Ctrl-C; ends every drain at once.

    Raises:
        StartError: a process could not start; its own message is in the text.
        PeerUnavailableError: the given Redis does not answer.
        ValueError: a port is in use, or the state file cannot be written.
    """
    check_port(programs.HOST, config.http_port, flag="--http-port")
    check_port(programs.HOST, config.grpc_port, flag="--grpc-port")
    if config.state_file is not None:
        check_state_file(config.state_file)
    if config.redis_url:
        await redis_server.check_redis(config.redis_url)
    async with contextlib.AsyncExitStack() as stack:
        run_dir = stack.enter_context(run_directory())
        core_share_fd = create_core_share()
        stack.callback(os.close, core_share_fd)
        ports = stack.enter_context(contextlib.ExitStack())
        place = programs.MeshPlace(
            config=config,
            run_dir=run_dir,
            redis_url=config.redis_url or redis_server.redis_url(run_dir),
            core_share_fd=core_share_fd,
            reserve_port=lambda: reserve_port(programs.HOST, ports),
        )
        mesh, tiers = _new_mesh(place, events)
        stack.callback(mesh.remove_state)
        for tier in tiers:
            stack.push_async_callback(_stop_all, tier, hurry)
        try:
            await _start(mesh, tiers, events)
        except BaseException:
            hurry.set()  # nothing has been served, so there is nothing to drain
            raise
        async with _kept_up(mesh):
            yield mesh


def _new_mesh(
    place: programs.MeshPlace, events: MeshEvents
) -> tuple[Mesh, list[list[ChildProcess]]]:
    """The mesh, and its processes in the order in which they start; they stop in the reverse."""
    given = place.config.state_file
    state_files = [place.run_dir / STATE_FILE, *([] if given is None else [given])]
    mesh = Mesh(place.config, place.redis_url, state_files)

    def child(spec: ChildSpec) -> ChildProcess:
        return ChildProcess(spec, on_change=mesh.write_state, on_output=events.on_output)

    tiers = [] if place.config.redis_url else [[child(programs.redis_spec(place))]]
    workers = programs.worker_specs(place)
    if place.config.has_store:
        workers.append(programs.store_spec(place))
    tiers.append([child(spec) for spec in workers])
    tiers.append([child(programs.gateway_spec(place))])
    mesh.children = [child for tier in tiers for child in tier]
    return mesh, tiers


async def _start(mesh: Mesh, tiers: Sequence[Sequence[ChildProcess]], events: MeshEvents) -> None:
    """Redis first; workers and gateway then together, since each needs Redis only."""
    started_s = time.monotonic()
    *redis, workers, gateway = tiers
    for together in (*redis, [*workers, *gateway]):
        try:
            async with asyncio.TaskGroup() as tasks:
                for child in together:
                    tasks.create_task(_start_one(child, events), name=f"start-{child.spec.name}")
        except* StartError as failed:
            raise failed.exceptions[0] from None
    await _wait_for_pools(mesh)
    mesh.came_up(time.monotonic() - started_s)


async def _start_one(child: ChildProcess, events: MeshEvents) -> None:
    events.on_started(child.spec.name)
    await child.start()
    events.on_ready(child.spec.name)


async def _wait_for_pools(mesh: Mesh) -> None:
    """Until the gateway has found every worker, a request would find none or not the best."""
    counts = {"prefill": mesh.config.num_prefill, "decode": mesh.config.num_decode}
    try:
        async with asyncio.timeout(_POOLS_SEEN_TIMEOUT_S):
            await pools_seen(mesh.address("gateway", "http"), counts)
    except TimeoutError:
        raise StartError(
            "every process serves, but the gateway did not find all workers in Redis"
            f" within {_POOLS_SEEN_TIMEOUT_S:g} s"
        ) from None


@asynccontextmanager
async def _kept_up(mesh: Mesh) -> AsyncIterator[None]:
    """Start crashed processes again inside the block."""
    async with asyncio.TaskGroup() as tasks:
        keepers = [
            tasks.create_task(child.keep(), name=f"keep-{child.spec.name}")
            for child in mesh.children
        ]
        try:
            yield
        finally:
            for keeper in keepers:
                keeper.cancel()


async def _stop_all(children: Sequence[ChildProcess], hurry: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        for child in children:
            tasks.create_task(child.stop(hurry=hurry), name=f"stop-{child.spec.name}")
