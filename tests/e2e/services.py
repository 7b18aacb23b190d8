"""Services that a test starts one by one, joined by Redis, as on hosts without a launcher."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import psutil

from deploy.launcher.pool_view import pools_seen

READY_TIMEOUT_S = 120.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
PROGRAMS = {"prefill": "prefill_worker", "decode": "decode_worker", "gateway": "gateway"}


class Services:
    """Processes by name; made by `services_of`."""

    def __init__(self, model: Path, redis_url: str, folder: Path) -> None:
        self.processes: dict[str, Process] = {}
        self._model = model
        self._redis_url = redis_url
        self._folder = folder

    async def start(
        self,
        name: str,
        role: str,
        *flags: str,
        num_ranks: int = 1,
        model: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Process:
        """Run `python -m` a role's program, under torchrun where it has ranks."""
        launcher = () if num_ranks == 1 else (*TORCHRUN, str(num_ranks))
        ports = ("--http-port", "0", "--grpc-port", "0")
        own = ports if role == "gateway" else ("--kv-pool-bytes", "8000000")
        with self._path(name, "log").open("wb") as output:
            process = self.processes[name] = await asyncio.create_subprocess_exec(
                *(sys.executable, *launcher, "-m", PROGRAMS[role], *own),
                *("--model", str(model or self._model), "--redis-url", self._redis_url),
                *("--ready-file", str(self._path(name, "json")), *flags),
                env={**os.environ, **(environment or {})},
                stdout=output,
                stderr=output,
            )
        return process

    async def address(self, name: str, kind: str) -> str:
        """An address of a service, once it is ready."""
        path, process = self._path(name, "json"), self.processes[name]
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not path.exists():
                assert process.returncode is None, self.log(name)
                await asyncio.sleep(0.05)
        addresses: dict[str, str] = json.loads(path.read_text())["addresses"]
        return addresses[kind]

    async def ready(self, num_prefill: int, num_decode: int) -> str:
        """The HTTP address of the service named gateway, once it sees so many workers."""
        address = await self.address("gateway", "http")
        async with asyncio.timeout(READY_TIMEOUT_S):
            await pools_seen(address, {"prefill": num_prefill, "decode": num_decode})
        return address

    def log(self, name: str) -> str:
        return self._path(name, "log").read_text()

    def _path(self, name: str, suffix: str) -> Path:
        return self._folder / f"{name}.{suffix}"


@asynccontextmanager
async def services_of(model: Path, redis_url: str, folder: Path) -> AsyncIterator[Services]:
    """Whatever is started inside the block is killed at its end."""
    services = Services(model, redis_url, folder)
    try:
        yield services
    finally:
        for name, process in services.processes.items():
            if process.returncode is None:
                for rank in psutil.Process(process.pid).children(recursive=True):
                    rank.kill()  # torchrun's, which would go on without it
                process.kill()
            await process.wait()
            sys.stdout.write(f"--- {name}\n{services.log(name)}")
