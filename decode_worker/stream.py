"""One gateway's stream: its sequences, their outputs batched by engine step, their spans."""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.context import Context

from engine.errors import IsthmusError
from engine.request import Request
from engine.runtime.commands import (
    EngineEvent,
    ErrorEvent,
    FirstTokenTiming,
    PreemptedEvent,
    PrefixFetchEvent,
    RequestEngine,
    SequenceMode,
    TokenEvent,
)
from kv_transfer.receiver import KvReceiver
from mesh.telemetry import record_fetch, span_between

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class OpenSequence:
    """What the stream remembers of a sequence between its first and its last token."""

    trace_context: Context | None
    first_token_ns: int = 0
    num_tokens: int = 0
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class Aborted:
    """Answers an abort once the blocks are free."""

    request_id: str
    num_freed_blocks: int


@dataclass(frozen=True, slots=True)
class Degraded:
    """The sequence left the best path; kind and reason are labels of few values."""

    request_id: str
    kind: str
    reason: str


Output = TokenEvent | ErrorEvent | Degraded | Aborted


class GatewayStream:
    """The EventSink of all sequences that one gateway submitted; the stream's end aborts them."""

    def __init__(self, engine: RequestEngine, receiver: KvReceiver) -> None:
        self._engine = engine
        self._receiver = receiver
        self._open: dict[str, OpenSequence] = {}
        self._aborts: set[asyncio.Task[None]] = set()
        self._outputs: list[Output] = []
        self._has_outputs = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    async def drained(self) -> None:
        """Return when no sequence is open."""
        await self._idle.wait()

    def submit(
        self, request: Request, mode: SequenceMode, *, trace_context: Context | None
    ) -> None:
        """Start a sequence; a refusal comes back as its output, so that the stream goes on."""
        try:
            self._engine.submit(request, mode, self)
        except IsthmusError as error:
            self._put([ErrorEvent(request.request_id, error)])
        else:
            self._open[request.request_id] = OpenSequence(trace_context)
            self._idle.clear()

    def abort(self, request_id: str) -> None:
        """End a sequence; the acknowledgement goes out once its blocks are free.

        Nobody waits for that: a writer that is held up must not hold up the stream.
        """
        self._forget(request_id)
        freeing = asyncio.create_task(self._free(request_id), name=f"abort-{request_id}")
        self._aborts.add(freeing)
        freeing.add_done_callback(self._aborts.discard)

    async def abort_all(self) -> None:
        """Free everything: the gateway is gone."""
        for request_id in list(self._open):
            self.abort(request_id)
        if self._aborts:
            await asyncio.wait(self._aborts)

    async def _free(self, request_id: str) -> None:
        """Free a sequence and what is reserved for it; a writer is fenced off first."""
        try:
            num_freed = await self._receiver.abort(request_id)
            num_freed += await self._engine.abort(request_id)
        except IsthmusError as error:
            self._put([ErrorEvent(request_id, error)])
        else:
            self._put([Aborted(request_id, num_freed)])

    def _forget(self, request_id: str) -> None:
        self._open.pop(request_id, None)
        if not self._open:
            self._idle.set()

    async def next_outputs(self) -> list[Output]:
        """Wait for outputs and take all there are: one message a step."""
        await self._has_outputs.wait()
        self._has_outputs.clear()
        outputs, self._outputs = self._outputs, []
        return outputs

    def put(self, events: Sequence[EngineEvent]) -> None:
        told: list[Output] = []
        for event in events:
            match event:
                case TokenEvent():
                    self._follow(event)
                    told.append(event)
                case ErrorEvent(request_id=request_id):
                    self._forget(request_id)
                    told.append(event)
                case PreemptedEvent(request_id=request_id):
                    self._count_preemption(request_id)
                    told.append(Degraded(request_id, "preemption", "no_free_blocks"))
                case PrefixFetchEvent(request_id=request_id, reason=reason):
                    self._record_fetch(event)
                    if event.has_failed:
                        told.append(Degraded(request_id, "prefix_fetch", reason))
        if told:
            self._put(told)

    def _put(self, outputs: Sequence[Output]) -> None:
        self._outputs.extend(outputs)
        self._has_outputs.set()

    def _record_fetch(self, event: PrefixFetchEvent) -> None:
        if (sequence := self._open.get(event.request_id)) is not None:
            record_fetch(event, sequence.trace_context)

    def _count_preemption(self, request_id: str) -> None:
        if (sequence := self._open.get(request_id)) is not None:
            sequence.num_preemptions += 1

    def _follow(self, token: TokenEvent) -> None:
        if (sequence := self._open.get(token.request_id)) is None:
            return
        sequence.num_tokens += 1
        if token.first is not None:
            sequence.first_token_ns = token.first.done_ns
            _record_first_step(sequence.trace_context, token.first)
        if token.finish_reason is not None:
            self._forget(token.request_id)
            span_between(
                "decode",
                sequence.first_token_ns,
                time.time_ns(),
                context=sequence.trace_context,
                attributes={
                    "num_tokens": sequence.num_tokens,
                    "num_preemptions": sequence.num_preemptions,
                    "finish_reason": token.finish_reason.value,
                },
            )


def _record_first_step(context: Context | None, timing: FirstTokenTiming) -> None:
    span_between("decode.queue", timing.arrived_ns, timing.scheduled_ns, context=context)
    span_between(
        "decode.first_step",
        timing.scheduled_ns,
        timing.done_ns,
        context=context,
        attributes={"prefilled_locally": timing.prefilled_locally},
    )
