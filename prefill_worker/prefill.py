"""The life of one prefill: compute, draw the first token, hand the KV over, free the blocks."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from engine.errors import PeerUnavailableError
from engine.request import Request
from engine.runtime.commands import (
    EngineEvent,
    ErrorEvent,
    KvComputedEvent,
    PrefixFetchEvent,
    RequestEngine,
    SequenceMode,
    TokenEvent,
)
from engine.scheduling.block_hash import block_hashes
from kv_transfer.report import HandoverReport
from kv_transfer.sender import KvSender

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefillJob:
    """One prompt and the decode worker that will continue it."""

    request: Request
    decode_worker_id: str
    decode_address: str


@dataclass(slots=True)
class _Running:
    task: asyncio.Task[object]
    num_freed_blocks: int = 0


class Inbox:
    """An EventSink that one coroutine reads."""

    def __init__(self) -> None:
        self._events: asyncio.Queue[EngineEvent] = asyncio.Queue()

    def put(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            self._events.put_nowait(event)

    async def get(self) -> EngineEvent:
        return await self._events.get()


class Prefiller:
    """Runs prefill jobs on one engine; the first token never waits for the handover."""

    def __init__(
        self,
        engine: RequestEngine,
        sender: KvSender,
        *,
        hash_salt_of: Callable[[int], int],
    ) -> None:
        """`hash_salt_of` prompt lengths is the engine's."""
        self._engine = engine
        self._sender = sender
        self._hash_salt_of = hash_salt_of
        self._running: dict[str, _Running] = {}
        self._idle = asyncio.Event()
        self._idle.set()

    async def run(
        self,
        job: PrefillJob,
        emit_token: Callable[[TokenEvent], Awaitable[None]],
        note_fetch: Callable[[PrefixFetchEvent], None] = lambda event: None,
    ) -> HandoverReport | None:
        """Compute the job; `emit_token` is awaited once, as soon as the token is drawn.

        `note_fetch` is called before, when part of the prompt may come from a store.

        Cancelling it (or `abort`) frees the blocks on both workers before it returns.

        Returns:
            What crossed; None when the first token ended the answer and nothing needs to.

        Raises:
            KvLeaseLostError, PeerUnavailableError, LayoutMismatchError, CapacityError: the decode
                worker did not take the KV; the token may have been emitted already.
        """
        request_id = job.request.request_id
        inbox = Inbox()
        self._engine.submit(job.request, SequenceMode.PREFILL, inbox)
        task = asyncio.current_task()
        assert task is not None
        running = self._running[request_id] = _Running(task)
        self._idle.clear()
        try:
            return await self._compute_and_hand_over(job, inbox, emit_token, note_fetch)
        finally:
            # Not before the handover is closed: until then its writers may read the blocks. Also
            # after success: the engine holds them until it is told.
            try:
                running.num_freed_blocks = await self._engine.abort(request_id)
            finally:
                del self._running[request_id]
                if not self._running:
                    self._idle.set()

    async def drained(self) -> None:
        """Return when no job runs."""
        await self._idle.wait()

    async def abort(self, request_id: str) -> int:
        """End a job and return the blocks freed, once both ends have freed them."""
        if (running := self._running.get(request_id)) is None:
            return 0
        running.task.cancel()
        await asyncio.wait([running.task])
        return running.num_freed_blocks

    async def _compute_and_hand_over(
        self,
        job: PrefillJob,
        inbox: Inbox,
        emit_token: Callable[[TokenEvent], Awaitable[None]],
        note_fetch: Callable[[PrefixFetchEvent], None],
    ) -> HandoverReport | None:
        computed: asyncio.Queue[KvComputedEvent | TokenEvent] = asyncio.Queue()
        async with asyncio.TaskGroup() as tasks:
            handover = tasks.create_task(self._hand_over(job, computed), name="handover")
            token = await _first_token(inbox, computed, note_fetch)
            if token.finish_reason is None:
                computed.put_nowait(token)
            else:
                handover.cancel()
            await emit_token(token)
        return None if token.finish_reason is not None else handover.result()

    async def _hand_over(
        self, job: PrefillJob, computed: asyncio.Queue[KvComputedEvent | TokenEvent]
    ) -> HandoverReport:
        request = job.request
        token_ids = request.prompt_token_ids + request.output_token_ids
        # Not of the output: keys stay as the prompt's length has made them.
        salt = self._hash_salt_of(len(request.prompt_token_ids))
        async with self._sender.handover(
            request.request_id,
            decode_address=job.decode_address,
            num_tokens=len(token_ids),
            hash_blocks=lambda size: block_hashes(token_ids, size, salt=salt),
        ) as handover:
            if (receiver_id := handover.session.offer.receiver_id) != job.decode_worker_id:
                raise PeerUnavailableError(
                    f"{job.decode_address} is {receiver_id}, not {job.decode_worker_id}"
                )
            while isinstance(event := await computed.get(), KvComputedEvent):
                await handover.push(
                    event.block_ids, event.first_token, event.num_tokens, step=event.step
                )
            if event.first is not None:
                handover.report.computed_ns = event.first.done_ns
            await handover.commit(event.token_id)
            return handover.report


async def _first_token(
    inbox: Inbox,
    computed: asyncio.Queue[KvComputedEvent | TokenEvent],
    note_fetch: Callable[[PrefixFetchEvent], None],
) -> TokenEvent:
    """Pass KV on to the handover until the token is drawn."""
    while True:
        match await inbox.get():
            case ErrorEvent(error=error):
                raise error
            case KvComputedEvent() as event:
                computed.put_nowait(event)
            case PrefixFetchEvent() as event:
                note_fetch(event)
            case TokenEvent() as token:
                return token
