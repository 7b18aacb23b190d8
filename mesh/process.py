"""The life of a service process: how it starts, says that it is ready, stops and fails."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop

from engine.errors import IsthmusError
from mesh.status import deliberate_error

logger = logging.getLogger(__name__)

START_FAILED = 1
"""Exit status when a service cannot run as it was asked to."""


async def shutdown_requested(
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> None:
    """Return on the first of `signals`; a second one gets the default action."""
    requested = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in signals:
        loop.add_signal_handler(number, requested.set)
    try:
        await requested.wait()
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def run_service(main: Coroutine[Any, Any, None]) -> int:
    """Run a service on uvloop until it ends; deliberate errors are one line, not a traceback.

    Returns:
        The process' exit status.
    """
    try:
        uvloop.run(main)
    except Exception as error:  # noqa: BLE001 - the last frame of the process
        return report_failure(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0


def report_failure(error: Exception) -> int:
    """Print why a service ends; returns the exit status."""
    cause = deliberate_error(error)
    if isinstance(cause, IsthmusError | ValueError):
        print(f"error: {' '.join(str(cause).split())}", file=sys.stderr, flush=True)  # noqa: T201
    else:
        logger.error("the service failed", exc_info=cause)
    return START_FAILED


def write_ready_file(path: Path | None, role: str, addresses: Mapping[str, str]) -> None:
    """Say once that the service answers: {"role", "pid", "addresses": {name: host:port}}."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"role": role, "pid": os.getpid(), "addresses": dict(addresses)}))
    partial.replace(path)
