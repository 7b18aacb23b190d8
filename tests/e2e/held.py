"""What the workers of a mesh hold for requests, read off their metrics."""

import asyncio
from collections.abc import Callable

from tests.e2e.mesh_process import MeshProcess

TIMEOUT_S = 30.0

_GAUGES = {
    "prefill": (
        *("isthmus_engine_waiting_sequences", "isthmus_engine_running_sequences"),
        *("isthmus_engine_waiting_tokens", "isthmus_handover_open"),
    ),
    "decode": (
        *("isthmus_engine_waiting_sequences", "isthmus_engine_running_sequences"),
        *("isthmus_kv_leases", "isthmus_kv_quarantined_leases", "isthmus_kv_waiting_reservations"),
    ),
    "gateway": ("isthmus_gateway_requests_in_flight",),
}


def held(mesh: MeshProcess) -> dict[str, float]:
    """All gauges that a request raises, and the blocks in use; names begin with the role."""
    found = {
        f"{role} {name}": mesh.metric(role, name)
        for role, names in _GAUGES.items()
        for name in names
    }
    return found | {f"{role} blocks": blocks_in_use(mesh, role) for role in ("prefill", "decode")}


def blocks_in_use(mesh: MeshProcess, role: str) -> float:
    return mesh.metric(role, "isthmus_kv_blocks") - mesh.metric(role, "isthmus_kv_free_blocks")


def idle(mesh: MeshProcess) -> dict[str, float]:
    """What `held` says of a mesh that answers nobody."""
    return dict.fromkeys(held(mesh), 0.0)


async def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    """Ask again and again; the last answer of `what` explains why it took too long."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + TIMEOUT_S
    while not await asyncio.to_thread(condition):
        assert loop.time() < deadline_s, what()


async def until_idle(mesh: MeshProcess) -> None:
    """Return when both workers and the gateway hold nothing."""
    await until(lambda: held(mesh) == idle(mesh), lambda: held(mesh))
