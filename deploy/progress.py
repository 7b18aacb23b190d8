"""What a person sees while the mesh starts: bars for bytes, a line for each process."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from deploy.launcher.mesh import MeshEvents

console = Console(stderr=True, highlight=False)


@contextmanager
def byte_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A callback (what, bytes done, bytes in all) that draws one bar for each `what`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    bars = Progress(*columns, console=console)
    tasks = {}

    def report(what: str, done: int, total: int) -> None:
        if what not in tasks:
            bars.start()  # not before: with nothing to fetch, nothing is drawn
            tasks[what] = bars.add_task(what, total=None)
        bars.update(tasks[what], completed=done, total=total or None)

    try:
        yield report
    finally:
        bars.stop()


@contextmanager
def start_progress(*, verbose: bool) -> Iterator[MeshEvents]:
    """Events that draw one line for each process until all serve."""
    columns = (SpinnerColumn(finished_text="[green]ok"), TextColumn("{task.description}"))
    bars = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)
    tasks = {}

    def started(name: str) -> None:
        tasks[name] = bars.add_task(f"starting {name}", total=1)

    def ready(name: str) -> None:
        bars.update(tasks[name], description=name, completed=1)

    def output(name: str, line: str) -> None:
        if verbose:
            sys.stderr.write(f"{name}: {line}\n")

    with bars:
        yield MeshEvents(on_started=started, on_ready=ready, on_output=output)


def show_launcher_log() -> None:
    """Restarts and drains that took too long are worth a line on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("isthmus: %(message)s"))
    logger = logging.getLogger("deploy")
    logger.addHandler(handler)
    logger.propagate = False
