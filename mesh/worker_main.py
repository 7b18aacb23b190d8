"""The `__main__` of both worker kinds: read the settings, find the model, serve."""

import os
import sys
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from engine.checkpoint.locate import default_cache_dir, locate_model
from mesh.logs import set_up_logging
from mesh.process import report_failure, run_service
from mesh.registry import connect_redis
from mesh.settings import parse_command_line
from mesh.telemetry import OTLP_ENDPOINT_VARIABLE
from mesh.worker import WorkerConfig

Serve = Callable[[Mapping[str, Any], Path, Mapping[str, str]], Coroutine[Any, Any, None]]
"""Settings by section, the model's path, the environment (where ranks find each other)."""


def worker_main(
    role: str,
    sections: Mapping[str, type[Any]],
    load_serve: Callable[[], Serve],
    *,
    program: str = "",
    description: str = "",
) -> int:
    """Run one worker process; returns its exit status.

    Args:
        role: prefill, decode or store.
        sections: settings besides the worker's own, by name.
        load_serve: imports what serves; called once the settings are known to be good, because
            importing torch takes seconds.
        program: in --help; empty: after the role, as is `description`.
        description: one sentence.
    """
    try:
        settings = parse_command_line(
            program or f"{role}_worker",
            description or f"One {role} worker of an Isthmus mesh.",
            {"worker": WorkerConfig, **sections},
            sys.argv[1:],
            os.environ,
        )
        worker: WorkerConfig = settings["worker"]
        set_up_logging(
            _name_in_logs(role, os.environ), level=worker.log_level, log_format=worker.log_format
        )
        if not worker.otlp_endpoint:
            endpoint = os.environ.get(OTLP_ENDPOINT_VARIABLE, "")
            settings["worker"] = replace(worker, otlp_endpoint=endpoint)
        path = locate_model(worker.model, cache_dir=default_cache_dir(os.environ))
        if _is_rank_0(os.environ):  # the others need none
            uvloop.run(_check_redis(worker.redis_url))
        serve = load_serve()
    except Exception as error:  # noqa: BLE001 - the last frame of the process
        return report_failure(error)
    return run_service(serve(settings, path, os.environ))


async def _check_redis(url: str) -> None:
    """A wrong URL is told at once, not when the model has been loaded."""
    async with connect_redis(url):
        pass


def _name_in_logs(role: str, environment: Mapping[str, str]) -> str:
    """Rank 0 is the worker; the other ranks say who they are."""
    return role if _is_rank_0(environment) else f"{role} rank {environment['RANK']}"


def _is_rank_0(environment: Mapping[str, str]) -> bool:
    return environment.get("RANK", "0") == "0"
