"""`isthmus status`: who is in the mesh and how busy they are, as Redis knows it."""

from collections.abc import Sequence

from rich.table import Table

from deploy.launcher.ready_file import read_state_file
from deploy.launcher.run_directory import local_state_files
from deploy.progress import console
from mesh.registry import WorkerDirectory, connect_redis
from protos.isthmus.v1.registry_pb2 import WorkerRecord, WorkerRole

_ROLES = (
    WorkerRole.WORKER_ROLE_GATEWAY,
    WorkerRole.WORKER_ROLE_STORE,
    WorkerRole.WORKER_ROLE_PREFILL,
    WorkerRole.WORKER_ROLE_DECODE,
)


def local_redis_urls() -> list[str]:
    """The private Redis of each mesh that `isthmus up` keeps up on this machine."""
    states = [state for path in local_state_files() for state in read_state_file(path)]
    return [state.addresses["redis"] for state in states if state.role == "redis"]


async def status(redis_urls: Sequence[str]) -> int:
    """Print a table for each mesh; status 1 when none of them has a decode worker."""
    if not redis_urls:
        console.print("no mesh of yours runs here; for another one give its --redis-url")
    can_answer = False
    for url in redis_urls:
        records = await _records(url)
        console.print(pool_table(records))
        can_answer |= any(record.role == WorkerRole.WORKER_ROLE_DECODE for record in records)
    return 0 if can_answer else 1


async def _records(redis_url: str) -> list[WorkerRecord]:
    async with connect_redis(redis_url) as redis, WorkerDirectory(redis, roles=_ROLES) as directory:
        return [record for role in _ROLES for record in directory.workers(role)]


def pool_table(records: Sequence[WorkerRecord]) -> Table:
    """One row for each record."""
    title = ", ".join(sorted({record.model_id for record in records})) or "no worker"
    table = Table(title=title, title_justify="left", title_style="bold")
    for heading in ("worker", "address", "ranks", "running", "waiting", "KV blocks", "state"):
        table.add_column(heading, overflow="fold")
    for record in records:
        load = record.load
        used = load.num_blocks - load.num_free_blocks
        table.add_row(
            record.worker_id,
            record.address,
            record.parallel,
            str(load.num_running),
            str(load.num_waiting),
            f"{used}/{load.num_blocks}" if load.num_blocks else "",
            "draining" if record.draining else "serving",
        )
    return table
