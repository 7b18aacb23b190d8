"""The life of a service process: how it starts, says that it is ready, stops and fails."""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import uvloop

from engine.errors import IsthmusError
from mesh.status import deliberate_error

logger = logging.getLogger(__name__)

START_FAILED = 1
"""Exit status when a service cannot run as it was asked to."""


@asynccontextmanager
async def stop_signals(
    signals: Sequence[signal.Signals] = (signal.SIGTERM, signal.SIGINT),
) -> AsyncIterator[asyncio.Event]:
    """Yield an event that the first of `signals` sets; a second one gets the default action.

    Enter before anything tells others that the service is up: who hears of it may stop it at once.
    """
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()

    def give_back() -> None:
        for number in signals:
            loop.remove_signal_handler(number)

    def on_signal() -> None:
        give_back()
        asked.set()

    for number in signals:
        loop.add_signal_handler(number, on_signal)
    try:
        yield asked
    finally:
        give_back()


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


def end_process(status: int) -> NoReturn:
    """End this process now, with all its threads.

    The interpreter's own end would unwind daemon threads that are inside native code, such as a
    wait for other ranks' store, and C++ answers that with SIGABRT.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # whoever read it has gone: no reason to end in another way
            stream.flush()
    os._exit(status)


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
