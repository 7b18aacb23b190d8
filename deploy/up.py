"""`isthmus up`: start a mesh, say when it is ready, keep it up."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from deploy.launcher.interrupts import interruptible
from deploy.launcher.mesh import Mesh, running_mesh
from deploy.launcher.mesh_config import WORKER_ROLES, MeshConfig
from deploy.progress import byte_progress, console, show_launcher_log, start_progress


def located_model(model: str, environment: Mapping[str, str]) -> Path:
    """The model's path on this machine, fetched with a progress bar if need be."""
    from engine.checkpoint import locate_model
    from engine.checkpoint.locate import default_cache_dir

    with byte_progress() as report:
        cache_dir = default_cache_dir(environment)
        return locate_model(model, cache_dir=cache_dir, progress=report).resolve()


def check_layouts(config: MeshConfig) -> None:
    """Say before anything is started whether the model can be split as the flags ask.

    Raises:
        ValueError: it cannot; the text has the flag, the model's numbers and what works.
    """
    from engine.checkpoint.read import read_config
    from engine.parallel.fit import check_layout_fits

    model = read_config(Path(config.model))
    for role in WORKER_ROLES:
        try:
            check_layout_fits(model, config.parallel(role))
        except ValueError as error:
            raise ValueError(f"--{role}-parallel: {error}") from None


@asynccontextmanager
async def visible_mesh(
    config: MeshConfig, *, hurry: asyncio.Event, verbose: bool
) -> AsyncIterator[Mesh]:
    """`running_mesh` with its progress on the terminal and one line when it is ready."""
    show_launcher_log()
    with ExitStack() as drawing:
        events = drawing.enter_context(start_progress(verbose=verbose))
        async with running_mesh(config, events, hurry=hurry) as mesh:
            drawing.close()
            print(ready_line(mesh), flush=True)
            yield mesh
            console.print("stopping", style="dim")


def ready_line(mesh: Mesh) -> str:
    """One line: what serves where."""
    config = mesh.config
    return (
        f"isthmus is ready in {mesh.start_s:.1f} s: {Path(config.model).name} on"
        f" http://{mesh.address('gateway', 'http')}/v1 and"
        f" grpc://{mesh.address('gateway', 'grpc')},"
        f" {config.num_prefill} prefill + {config.num_decode} decode"
        f"{' + store' if config.has_store else ''}"
    )


async def up(config: MeshConfig, *, verbose: bool) -> int:
    """Run until a signal; returns the exit status: 0 if the mesh was ready by then."""
    was_ready = False

    async def main(hurry: asyncio.Event) -> int:
        nonlocal was_ready
        async with visible_mesh(config, hurry=hurry, verbose=verbose):
            was_ready = True
            await asyncio.Event().wait()
        return 0

    status = await interruptible(main)
    return 0 if was_ready else status
