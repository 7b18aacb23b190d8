"""The workers that this gateway is connected to, as the registry names them; routes over them."""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from engine.errors import NotReadyError
from gateway.decode_stream import DecodeStream
from gateway.prefill_client import PrefillClient
from gateway.routing import LoadBook, Policy
from protos.isthmus.v1.registry_pb2 import (
    WORKER_ROLE_DECODE,
    WORKER_ROLE_PREFILL,
    WorkerRecord,
    WorkerRole,
)

logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 30.0
"""A prefill worker that the registry has lost may still answer what it was asked."""
SETTLE_S = 1.0


class WorkerSource(Protocol):
    """Who is there; `mesh.registry.WorkerDirectory` is one."""

    @property
    def is_stale(self) -> bool: ...

    def workers(self, role: WorkerRole) -> list[WorkerRecord]: ...

    def on_change(self, callback: Callable[[], None]) -> None: ...


@dataclass(slots=True)
class PrefillWorker:
    record: WorkerRecord
    client: PrefillClient
    book: LoadBook


@dataclass(slots=True)
class DecodeWorker:
    record: WorkerRecord
    stream: DecodeStream
    book: LoadBook
    task: asyncio.Task[None]


@dataclass(frozen=True, slots=True)
class Route:
    """Where one attempt at a sequence runs; `prefill` None: the decode worker does it all."""

    prefill: PrefillWorker | None
    decode: DecodeWorker
    num_tokens: int


class WorkerPools:
    """Follows the registry: one stream to each decode worker, one channel to each prefill worker.

    Use as `async with WorkerPools(...) as pools`. A worker that the registry has lost stays as long
    as its stream lives, because the registry is a hint.

    Args:
        model_id: workers of other models are left alone; empty takes all.
    """

    def __init__(self, source: WorkerSource, policy: Policy, *, model_id: str = "") -> None:
        self.source = source
        self.prefill: dict[str, PrefillWorker] = {}
        self.decode: dict[str, DecodeWorker] = {}
        self._policy = policy
        self._model_id = model_id
        self._turn = 0
        self._started_s = 0.0
        self._tasks = asyncio.TaskGroup()
        self._closing: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._started_s = asyncio.get_running_loop().time()
        self.source.on_change(self.refresh)
        self.refresh()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in [*(worker.task for worker in self.decode.values()), *self._closing]:
            task.cancel()
        await self._tasks.__aexit__(exc_type, exc, traceback)
        for prefill_worker in self.prefill.values():
            await prefill_worker.client.aclose()

    @property
    def is_ready(self) -> bool:
        """True when a new sequence would find a decode worker."""
        return any(self._is_open(worker) for worker in self.decode.values())

    def num_open_workers(self, role: str) -> int:
        """Workers of a role, prefill or decode, that a new sequence could be placed on."""
        if role == "decode":
            return sum(map(self._is_open, self.decode.values()))
        return sum(not worker.record.draining for worker in self.prefill.values())

    @property
    def max_context_tokens(self) -> int:
        """What every decode worker can hold; 0 when none is known."""
        limits = [worker.record.max_context_tokens for worker in self.decode.values()]
        return min(limits, default=0)

    def check_ready(self) -> None:
        """Raises NotReadyError, saying why, unless a new sequence would find a decode worker."""
        if not self.is_ready:
            raise NotReadyError(self._why_not_ready())

    async def settled(self) -> None:
        """Wait, briefly, while it is too early to say that nobody is there.

        That is while a worker is being connected to for the first time, and in the first moments
        of this gateway, when it may not have heard of all workers.
        """
        if self.is_ready:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while not self.is_ready and self._is_settling():
                    await self.wait_for_change()

    def _is_settling(self) -> bool:
        age_s = asyncio.get_running_loop().time() - self._started_s
        return age_s < SETTLE_S or any(w.stream.is_new for w in self.decode.values())

    async def wait_for_change(self) -> None:
        """Return once workers have come, gone, connected or disconnected."""
        await self._changed.wait()

    def refresh(self) -> None:
        """Take over what the registry says now."""
        self._refresh_decode(self._known(WORKER_ROLE_DECODE))
        self._refresh_prefill(self._known(WORKER_ROLE_PREFILL))
        self._note_change()

    def route(
        self, num_tokens: int, *, avoid: Collection[str] = (), needs_prefill: bool = True
    ) -> Route:
        """Choose workers and count the sequence as theirs until `release`.

        Args:
            num_tokens: to be computed before the next token can be drawn.
            avoid: worker ids that failed this sequence: prefill workers among them are left out,
                decode workers only if there is another one.
            needs_prefill: False keeps the whole sequence on the decode worker.

        Raises:
            NotReadyError: no decode worker is connected; the text says what is known.
        """
        self.take_loads()
        self.check_ready()
        decode = [w.book.candidate(w.record) for w in self.decode.values() if self._is_open(w)]
        preferred = [candidate for candidate in decode if candidate.worker_id not in avoid]
        prefill = [
            worker.book.candidate(worker.record)
            for worker_id, worker in self.prefill.items()
            if needs_prefill and worker_id not in avoid and not worker.record.draining
        ]
        choice = self._policy.choose(prefill, preferred or decode, num_tokens)
        self._turn += 1
        route = Route(
            self.prefill[choice.prefill] if choice.prefill is not None else None,
            self.decode[choice.decode],
            num_tokens,
        )
        route.decode.book.add(num_tokens, self._turn)
        if route.prefill is not None:
            route.prefill.book.add(num_tokens, self._turn)
        return route

    def take_loads(self) -> None:
        """`refresh` hears of comings and goings only; loads change with each heartbeat."""
        for record in self.source.workers(WORKER_ROLE_DECODE):
            if decode := self.decode.get(record.worker_id):
                decode.record = record
        for record in self.source.workers(WORKER_ROLE_PREFILL):
            if prefill := self.prefill.get(record.worker_id):
                prefill.record = record

    def _known(self, role: WorkerRole) -> Sequence[WorkerRecord]:
        records = self.source.workers(role)
        return [r for r in records if not self._model_id or r.model_id == self._model_id]

    def _refresh_decode(self, records: Sequence[WorkerRecord]) -> None:
        known = {record.worker_id: record for record in records}
        for worker_id, worker in list(self.decode.items()):
            record = known.get(worker_id)
            has_moved = record is not None and record.address != worker.record.address
            if has_moved or (record is None and not worker.stream.is_available):
                worker.task.cancel()
                del self.decode[worker_id]
            elif record is not None:
                worker.record = record
        for worker_id, record in known.items():
            if worker_id not in self.decode:
                stream = DecodeStream(worker_id, record.address, self._on_stream_change)
                task = self._tasks.create_task(stream.run(), name=f"decode-stream-{worker_id}")
                self.decode[worker_id] = DecodeWorker(record, stream, LoadBook(), task)

    def _refresh_prefill(self, records: Sequence[WorkerRecord]) -> None:
        known = {record.worker_id: record for record in records}
        for worker_id, worker in list(self.prefill.items()):
            record = known.get(worker_id)
            if record is None or record.address != worker.record.address:
                del self.prefill[worker_id]
                self._close_later(worker.client)
            else:
                worker.record = record
        for worker_id, record in known.items():
            if worker_id not in self.prefill:
                client = PrefillClient(worker_id, record.address)
                self.prefill[worker_id] = PrefillWorker(record, client, LoadBook())

    def _close_later(self, client: PrefillClient) -> None:
        task = self._tasks.create_task(
            client.aclose(CLOSE_GRACE_S), name=f"close-{client.worker_id}"
        )
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _on_stream_change(self) -> None:
        known = {record.worker_id for record in self.source.workers(WORKER_ROLE_DECODE)}
        for worker_id, worker in list(self.decode.items()):
            if worker_id not in known and not worker.stream.is_available:
                worker.task.cancel()
                del self.decode[worker_id]
        self._note_change()

    def _note_change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _is_open(self, worker: DecodeWorker) -> bool:
        return worker.stream.is_available and not worker.record.draining

    def _why_not_ready(self) -> str:
        if self.decode:
            return f"none of the {len(self.decode)} decode workers is connected; try again shortly"
        others = {record.model_id for record in self.source.workers(WORKER_ROLE_DECODE)}
        if others:
            return f"no decode worker serves {self._model_id!r}, only {sorted(others)}"
        return "no decode worker is registered; start one with `isthmus decode-worker`"
