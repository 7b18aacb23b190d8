"""`python -m tests.fakes.fake_up STATE LOG [ROLE=FLAG ...]`: `isthmus up` over fake services."""

import asyncio
import sys
from pathlib import Path

from deploy import up
from deploy.launcher.mesh_config import MeshConfig
from engine.errors import IsthmusError

SERVICE = str(Path(__file__).with_name("mesh_service.py"))


def fake_programs(
    log: Path, more: dict[str, tuple[str, ...]] | None = None
) -> dict[str, list[str]]:
    """Programs of a MeshConfig: the fake for each role."""
    return {
        role: ["-S", SERVICE, "--role", role, "--log", str(log), *(more or {}).get(role, ())]
        for role in ("prefill", "decode", "gateway")
    }


def main(state_file: str, log: str, *more: str) -> None:
    flags = {
        role: tuple(flag.split(" ", 1)) for role, flag in (pair.split("=", 1) for pair in more)
    }
    config = MeshConfig(
        model="fake",
        http_port=0,
        grpc_port=0,
        state_file=Path(state_file),
        programs=fake_programs(Path(log), flags),
    )
    try:
        sys.exit(asyncio.run(up.up(config, verbose=False)))
    except IsthmusError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
