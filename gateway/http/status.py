"""What the status page and its JSON show: the pools as this gateway sees them."""

from typing import Any

import msgspec

from gateway.pools import DecodeWorker, PrefillWorker
from gateway.service import InferenceService


class WorkerStatus(msgspec.Struct):
    worker_id: str
    role: str
    address: str
    pid: int
    is_connected: bool
    is_draining: bool
    num_waiting: int
    num_running: int
    num_waiting_tokens: int
    num_free_blocks: int
    num_blocks: int
    num_own_sequences: int
    """Placed there by this gateway and not ended."""


class MeshStatus(msgspec.Struct):
    model: str
    max_context_tokens: int
    is_ready: bool
    is_registry_stale: bool
    num_sequences: int
    workers: list[WorkerStatus]


def mesh_status(service: InferenceService) -> MeshStatus:
    pools = service.pools
    pools.take_loads()
    return MeshStatus(
        model=service.model_id,
        max_context_tokens=pools.max_context_tokens,
        is_ready=pools.is_ready,
        is_registry_stale=pools.source.is_stale,
        num_sequences=service.admission.num_sequences,
        workers=[
            *(_worker(w, is_connected=True) for w in pools.prefill.values()),
            *(_worker(w, is_connected=w.stream.is_available) for w in pools.decode.values()),
        ],
    )


def _worker(worker: PrefillWorker | DecodeWorker, *, is_connected: bool) -> WorkerStatus:
    record, load = worker.record, worker.record.load
    fields: dict[str, Any] = {
        name: getattr(load, name) for name in load.DESCRIPTOR.fields_by_name if name[:4] == "num_"
    }
    return WorkerStatus(
        worker_id=record.worker_id,
        role="prefill" if isinstance(worker, PrefillWorker) else "decode",
        address=record.address,
        pid=record.pid,
        is_connected=is_connected,
        is_draining=record.draining,
        num_own_sequences=worker.book.num_sequences,
        **fields,
    )
