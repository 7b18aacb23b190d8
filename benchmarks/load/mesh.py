"""Starts a mesh with `isthmus up` for the time of a benchmark, and stops it."""

import asyncio
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from deploy.launcher.ready_file import read_state_file
from engine.errors import NotReadyError

START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.1
UP_COMMAND = (sys.executable, "-m", "deploy", "up")


@dataclass(frozen=True, kw_only=True, slots=True)
class StartedMesh:
    """A mesh that serves."""

    url: str
    state_file: Path


@asynccontextmanager
async def started_mesh(
    arguments: Sequence[str], *, command: Sequence[str] = UP_COMMAND
) -> AsyncIterator[StartedMesh]:
    """Run `isthmus up` with `arguments` on free ports, until the block is left.

    Raises:
        NotReadyError: it ended, or was not ready in time; its output is on this terminal.
    """
    with tempfile.TemporaryDirectory(prefix="isthmus-bench-") as folder:
        state_file = Path(folder, "mesh.json")
        ports = ["--http-port", "0", "--grpc-port", "0", "--state-file", str(state_file)]
        process = await asyncio.create_subprocess_exec(
            *command, *ports, *arguments, stdout=sys.stderr
        )
        try:
            yield StartedMesh(url=await _ready_url(process, state_file), state_file=state_file)
        finally:
            await _stop(process)


async def _ready_url(process: asyncio.subprocess.Process, state_file: Path) -> str:
    try:
        async with asyncio.timeout(START_TIMEOUT_S), httpx.AsyncClient(trust_env=False) as client:
            while process.returncode is None:
                if (url := _gateway_url(state_file)) and await _is_healthy(client, url):
                    return url
                await asyncio.sleep(POLL_S)
    except TimeoutError:
        raise NotReadyError(f"`isthmus up` was not ready within {START_TIMEOUT_S:.0f} s") from None
    raise NotReadyError(f"`isthmus up` ended with status {process.returncode}")


def _gateway_url(state_file: Path) -> str:
    if not state_file.exists():
        return ""
    addresses = [p.addresses.get("http") for p in read_state_file(state_file)]
    return next((f"http://{address}" for address in addresses if address), "")


async def _is_healthy(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(f"{url}/health")).is_success
    except httpx.HTTPError:
        return False


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
