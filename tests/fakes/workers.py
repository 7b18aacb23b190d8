"""Prefill and decode workers without an engine: real grpc.aio servers that obey the protos.

Tokens are a function of prompt, seed and position, so that any worker continues any sequence as
another would have. Test hooks hold steps back, make calls fail and kill a worker; `open_sequences`
shows what is still held. Reserve and Commit go over the wire as between real workers.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from grpc import aio

from engine.errors import IsthmusError, KvLeaseLostError, UnknownRequestError
from mesh.channel import open_channel
from mesh.server import listening
from mesh.status import error_from_rpc, status_of
from protos.isthmus.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    kv_transfer_pb2,
    kv_transfer_pb2_grpc,
    prefill_pb2,
    prefill_pb2_grpc,
    registry_pb2,
)
from protos.isthmus.v1.inference_pb2 import Degradation
from protos.isthmus.v1.sampling_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    TopLogprob,
)

VOCAB_SIZE = 257
END_TOKEN_ID = 256
EPOCH = 7
BYTES_PER_TOKEN = 100

NextToken = Callable[[Sequence[int], int, int], int]
"""(prompt, position in the answer, seed) -> token id."""


def next_token(prompt: Sequence[int], position: int, seed: int) -> int:
    """Some printable ASCII byte; equal on every worker."""
    return 97 + (sum(prompt) * 31 + position * 7 + position * position + seed % 1000) % 26


def spelling(text: bytes, end_token_id: int | None = None) -> NextToken:
    """Answers that spell `text` byte by byte, then the end token (or text again)."""

    def next_byte(prompt: Sequence[int], position: int, seed: int) -> int:
        del prompt, seed
        if position >= len(text) and end_token_id is not None:
            return end_token_id
        return text[position % len(text)]

    return next_byte


class Tap:
    """Lets a test count out steps; open unless `close` is called."""

    def __init__(self) -> None:
        self._is_closed = False
        self._num_permits = 0
        self._changed = asyncio.Event()

    def close(self) -> None:
        self._is_closed = True

    def open(self) -> None:
        self._is_closed = False
        self._changed.set()

    def let_through(self, num_steps: int) -> None:
        self._num_permits += num_steps
        self._changed.set()

    async def wait(self) -> None:
        while self._is_closed and not self._num_permits:
            self._changed.clear()
            await self._changed.wait()
        if self._is_closed:
            self._num_permits -= 1


@dataclass(slots=True)
class OpenSequence:
    submit: decode_pb2.SubmitSequence
    outputs: "asyncio.Queue[decode_pb2.SequenceOutput]"
    committed: "asyncio.Future[int]"
    task: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class FakeWorker:
    """What both kinds share: a record, an answer function and a server that can die."""

    worker_id: str
    next_token: NextToken = next_token
    end_token_id: int = END_TOKEN_ID
    address: str = ""
    load: registry_pb2.WorkerLoad = field(default_factory=registry_pb2.WorkerLoad)
    draining: bool = False
    model_id: str = "fake-model"
    max_context_tokens: int = 4096
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    role = registry_pb2.WORKER_ROLE_UNSPECIFIED

    def record(self) -> registry_pb2.WorkerRecord:
        return registry_pb2.WorkerRecord(
            worker_id=self.worker_id,
            role=self.role,
            epoch=EPOCH,
            address=self.address,
            model_id=self.model_id,
            max_context_tokens=self.max_context_tokens,
            load=self.load,
            draining=self.draining,
        )

    def add_servicers(self, server: aio.Server) -> None:
        raise NotImplementedError

    async def start(self) -> None:
        port = await self._stack.enter_async_context(
            listening(self.add_servicers, address="127.0.0.1:0", drain_grace_s=0)
        )
        self.address = f"127.0.0.1:{port}"

    async def die(self) -> None:
        """Cut every connection at once."""
        await self._stack.aclose()

    def note(self) -> None:
        """Something that a test may wait for has changed."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until `is_so`, looking whenever something has changed here."""
        while not is_so():
            await self._changed.wait()

    def draw(self, prompt: Sequence[int], position: int, sampling: SamplingParams) -> int:
        return self.next_token(prompt, position, sampling.seed)

    def finish_reason(
        self, token_id: int, num_outputs: int, sampling: SamplingParams
    ) -> FinishReason:
        is_end = token_id == self.end_token_id and not sampling.ignore_eos
        if is_end or token_id in sampling.stop_token_ids:
            return FINISH_REASON_STOP
        if num_outputs >= sampling.max_tokens:
            return FINISH_REASON_LENGTH
        return FINISH_REASON_UNSPECIFIED


def logprobs_of(token_id: int, sampling: SamplingParams) -> TokenLogprobs | None:
    if not sampling.HasField("num_top_logprobs"):
        return None
    top = [
        TopLogprob(token_id=(token_id + k) % VOCAB_SIZE, logprob=-0.5 - k)
        for k in range(sampling.num_top_logprobs)
    ]
    return TokenLogprobs(logprob=-0.5, top=top)


@dataclass(slots=True, eq=False)
class FakeDecodeWorker(FakeWorker):
    """Decodes step by step: each step gives every running sequence one token."""

    tap: Tap = field(default_factory=Tap)
    """One permit lets one token of one sequence out."""
    submitted: list[decode_pb2.SubmitSequence] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    fail_next: list[IsthmusError] = field(default_factory=list)
    """The next submitted sequences end with these errors."""
    open_sequences: dict[str, OpenSequence] = field(default_factory=dict)
    reserved: set[str] = field(default_factory=set)
    num_reserved_ever: int = 0
    num_prefill_tokens: int = 0
    says_degraded: list[tuple[str, str]] = field(default_factory=list)
    """Kinds and reasons that every sequence tells before its first token."""
    step_s: float = 0.0
    """All running sequences get their tokens together, this often; 0: each as fast as it goes."""
    _next_step: "asyncio.Future[None] | None" = None
    _leases: dict[int, str] = field(default_factory=dict)
    _commits: dict[str, "asyncio.Future[int]"] = field(default_factory=dict)
    _released: set[str] = field(default_factory=set)

    role = registry_pb2.WORKER_ROLE_DECODE

    def add_servicers(self, server: aio.Server) -> None:
        decode_pb2_grpc.add_DecodeServiceServicer_to_server(_DecodeServicer(self), server)
        kv_transfer_pb2_grpc.add_KvTransferServiceServicer_to_server(_KvServicer(self), server)

    def committed(self, request_id: str) -> "asyncio.Future[int]":
        future = self._commits.get(request_id)
        if future is None:
            future = self._commits[request_id] = asyncio.get_running_loop().create_future()
        return future

    def reserve(self, request_id: str) -> int:
        if request_id in self.aborted or request_id in self._released:
            raise KvLeaseLostError(f"{request_id} was aborted")
        self.num_reserved_ever += 1
        self._leases[self.num_reserved_ever] = request_id
        self.reserved.add(request_id)
        return self.num_reserved_ever

    def commit(self, lease_id: int, first_token_id: int) -> None:
        request_id = self._leases.get(lease_id)
        if request_id is None:
            raise UnknownRequestError(f"no lease {lease_id}")
        self.reserved.discard(request_id)
        self.note()
        future = self.committed(request_id)
        if not future.done():
            future.set_result(first_token_id)

    def release(self, request_id: str) -> int:
        """Give back what is reserved, or will be asked for too late."""
        self._released.add(request_id)
        was_reserved = request_id in self.reserved
        self.reserved.discard(request_id)
        self.note()
        return int(was_reserved)

    def drop(self, request_id: str) -> int:
        """End a sequence and its reservation; blocks that were freed."""
        was_reserved = request_id in self.reserved
        self.reserved.discard(request_id)
        self._commits.pop(request_id, None)
        for lease_id in [k for k, v in self._leases.items() if v == request_id]:
            del self._leases[lease_id]
        sequence = self.open_sequences.pop(request_id, None)
        if sequence is not None and sequence.task is not None:
            sequence.task.cancel()
        self.note()
        return 1 if sequence is not None or was_reserved else 0

    async def _step(self) -> None:
        """Wait for the next step, which all that wait for it share."""
        if self._next_step is None:
            loop = asyncio.get_running_loop()
            step = self._next_step = loop.create_future()
            loop.call_later(self.step_s, self._end_step, step)
        await asyncio.shield(self._next_step)

    def _end_step(self, step: "asyncio.Future[None]") -> None:
        self._next_step = None
        step.set_result(None)

    async def run(self, sequence: OpenSequence) -> None:
        submit = sequence.submit
        sampling, request_id = submit.sampling, submit.request_id
        outputs = list(submit.output_token_ids)
        prompt = list(submit.prompt_token_ids)
        if submit.prefill_locally:
            self.num_prefill_tokens += len(prompt) + len(outputs)
        else:
            outputs.append(await sequence.committed)
        for kind, why in self.says_degraded:
            degraded = Degradation(kind=kind, reason=why)
            await sequence.outputs.put(
                decode_pb2.SequenceOutput(request_id=request_id, degraded=degraded)
            )
        is_first = True
        while True:
            await self.tap.wait()
            if self.step_s:
                await self._step()
            token_id = self.draw(prompt, len(outputs), sampling)
            outputs.append(token_id)
            reason = self.finish_reason(token_id, len(outputs), sampling)
            token = decode_pb2.DecodedToken(
                token_id=token_id,
                logprobs=logprobs_of(token_id, sampling),
                finish_reason=reason,
            )
            if is_first:
                is_first = False
                token.first_step.queue_ns = 1_000
                token.first_step.step_ns = 2_000
                token.first_step.prefilled_locally = submit.prefill_locally
            if reason:
                self.open_sequences.pop(request_id, None)
                self.drop(request_id)
            await sequence.outputs.put(
                decode_pb2.SequenceOutput(request_id=request_id, token=token)
            )
            if reason:
                return
            await asyncio.sleep(0)


class _DecodeServicer(decode_pb2_grpc.DecodeServiceServicer):
    def __init__(self, worker: FakeDecodeWorker) -> None:
        self._worker = worker

    async def Serve(
        self,
        requests: AsyncIterator[decode_pb2.ServeRequest],
        context: aio.ServicerContext[decode_pb2.ServeRequest, decode_pb2.ServeResponse],
    ) -> None:
        outputs: asyncio.Queue[decode_pb2.SequenceOutput] = asyncio.Queue()
        mine: set[str] = set()
        try:
            async with asyncio.TaskGroup() as tasks:
                writing = tasks.create_task(self._write(outputs, context))
                async for request in requests:
                    await self._take(request, outputs, mine, tasks)
                writing.cancel()
        finally:
            for request_id in mine:
                self._worker.drop(request_id)

    async def _take(
        self,
        request: decode_pb2.ServeRequest,
        outputs: "asyncio.Queue[decode_pb2.SequenceOutput]",
        mine: set[str],
        tasks: asyncio.TaskGroup,
    ) -> None:
        worker = self._worker
        if request.HasField("abort"):
            request_id = request.abort.request_id
            worker.aborted.append(request_id)
            mine.discard(request_id)
            await outputs.put(
                decode_pb2.SequenceOutput(
                    request_id=request_id,
                    aborted=decode_pb2.AbortedSequence(num_freed_blocks=worker.drop(request_id)),
                )
            )
            return
        submit = request.submit
        worker.submitted.append(submit)
        worker.note()
        if worker.fail_next:
            code, text = status_of(worker.fail_next.pop(0))
            await outputs.put(
                decode_pb2.SequenceOutput(
                    request_id=submit.request_id,
                    error=decode_pb2.SequenceError(status_code=code.value[0], message=text),
                )
            )
            return
        mine.add(submit.request_id)
        sequence = OpenSequence(submit, outputs, worker.committed(submit.request_id))
        worker.open_sequences[submit.request_id] = sequence
        worker.note()
        sequence.task = tasks.create_task(worker.run(sequence))

    async def _write(
        self,
        outputs: "asyncio.Queue[decode_pb2.SequenceOutput]",
        context: aio.ServicerContext[decode_pb2.ServeRequest, decode_pb2.ServeResponse],
    ) -> None:
        while True:
            batch = [await outputs.get()]
            await asyncio.sleep(0)  # what the same step still puts there
            while not outputs.empty():
                batch.append(outputs.get_nowait())
            await context.write(decode_pb2.ServeResponse(outputs=batch))


class _KvServicer(kv_transfer_pb2_grpc.KvTransferServiceServicer):
    def __init__(self, worker: FakeDecodeWorker) -> None:
        self._worker = worker

    async def Reserve(
        self,
        request: kv_transfer_pb2.ReserveRequest,
        context: aio.ServicerContext[
            kv_transfer_pb2.ReserveRequest, kv_transfer_pb2.ReserveResponse
        ],
    ) -> kv_transfer_pb2.ReserveResponse:
        return kv_transfer_pb2.ReserveResponse(lease_id=self._worker.reserve(request.request_id))

    async def Commit(
        self,
        request: kv_transfer_pb2.CommitRequest,
        context: aio.ServicerContext[kv_transfer_pb2.CommitRequest, kv_transfer_pb2.CommitResponse],
    ) -> kv_transfer_pb2.CommitResponse:
        self._worker.commit(request.lease_id, request.first_token_id)
        return kv_transfer_pb2.CommitResponse()

    async def Release(
        self,
        request: kv_transfer_pb2.ReleaseRequest,
        context: aio.ServicerContext[
            kv_transfer_pb2.ReleaseRequest, kv_transfer_pb2.ReleaseResponse
        ],
    ) -> kv_transfer_pb2.ReleaseResponse:
        num_freed_blocks = self._worker.release(request.request_id)
        return kv_transfer_pb2.ReleaseResponse(num_freed_blocks=num_freed_blocks)


@dataclass(slots=True, eq=False)
class FakePrefillWorker(FakeWorker):
    """Draws the first token, reserves and commits on the decode worker."""

    tap: Tap = field(default_factory=Tap)
    """Before the first token."""
    handover_tap: Tap = field(default_factory=Tap)
    """Between first token and commit."""
    fail_next: list[IsthmusError] = field(default_factory=list)
    """The next calls fail with these before a token."""
    fail_handover_next: list[IsthmusError] = field(default_factory=list)
    """The next calls fail with these after their first token."""
    requests: list[prefill_pb2.PrefillRequest] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    open_sequences: set[str] = field(default_factory=set)
    commits_before_token: bool = False
    """Let the decode worker's tokens overtake the first one."""

    role = registry_pb2.WORKER_ROLE_PREFILL

    def add_servicers(self, server: aio.Server) -> None:
        prefill_pb2_grpc.add_PrefillServiceServicer_to_server(_PrefillServicer(self), server)


class _PrefillServicer(prefill_pb2_grpc.PrefillServiceServicer):
    def __init__(self, worker: FakePrefillWorker) -> None:
        self._worker = worker

    async def Prefill(
        self,
        request: prefill_pb2.PrefillRequest,
        context: aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse],
    ) -> None:
        worker = self._worker
        worker.requests.append(request)
        metadata = context.invocation_metadata() or ()
        worker.metadata.append({k: v for k, v in metadata if isinstance(v, str)})
        if worker.fail_next:
            raise worker.fail_next.pop(0)
        worker.open_sequences.add(request.request_id)
        worker.note()
        try:
            await self._run(request, context)
        finally:
            worker.open_sequences.discard(request.request_id)
            worker.note()

    async def _run(
        self,
        request: prefill_pb2.PrefillRequest,
        context: aio.ServicerContext[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse],
    ) -> None:
        worker, sampling = self._worker, request.sampling
        await worker.tap.wait()
        num_outputs = len(request.output_token_ids)
        token_id = worker.draw(request.prompt_token_ids, num_outputs, sampling)
        reason = worker.finish_reason(token_id, num_outputs + 1, sampling)
        first = prefill_pb2.PrefillResponse(
            first_token=prefill_pb2.FirstToken(
                token_id=token_id,
                logprobs=logprobs_of(token_id, sampling),
                finish_reason=reason,
                queue_ns=3_000,
                compute_ns=4_000,
            )
        )
        num_tokens = len(request.prompt_token_ids) + num_outputs
        if worker.commits_before_token and not reason:
            handover = await self._hand_over(request, token_id, num_tokens)
            await worker.handover_tap.wait()
            await context.write(first)
        else:
            await context.write(first)
            if reason:
                return
            if worker.fail_handover_next:
                raise worker.fail_handover_next.pop(0)
            await worker.handover_tap.wait()
            handover = await self._hand_over(request, token_id, num_tokens)
        await context.write(prefill_pb2.PrefillResponse(handover=handover))

    async def _hand_over(
        self, request: prefill_pb2.PrefillRequest, token_id: int, num_tokens: int
    ) -> prefill_pb2.HandoverReport:
        try:
            async with open_channel(request.decode_address) as channel:
                stub = kv_transfer_pb2_grpc.KvTransferServiceStub(channel)
                try:
                    reserved = await stub.Reserve(
                        kv_transfer_pb2.ReserveRequest(
                            request_id=request.request_id, epoch=EPOCH, num_tokens=num_tokens
                        )
                    )
                    await stub.Commit(
                        kv_transfer_pb2.CommitRequest(
                            epoch=EPOCH, lease_id=reserved.lease_id, first_token_id=token_id
                        )
                    )
                except asyncio.CancelledError:  # as a real one: what it has reserved is given back
                    await stub.Release(
                        kv_transfer_pb2.ReleaseRequest(epoch=EPOCH, request_id=request.request_id)
                    )
                    raise
        except aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        return prefill_pb2.HandoverReport(
            num_bytes=num_tokens * BYTES_PER_TOKEN,
            num_tokens=num_tokens,
            transfer_ns=5_000,
            data_plane="tcp",
        )

    async def Abort(
        self,
        request: prefill_pb2.AbortRequest,
        context: aio.ServicerContext[prefill_pb2.AbortRequest, prefill_pb2.AbortResponse],
    ) -> prefill_pb2.AbortResponse:
        self._worker.aborted.append(request.request_id)
        self._worker.note()
        was_open = request.request_id in self._worker.open_sequences
        return prefill_pb2.AbortResponse(num_freed_blocks=int(was_open))


class ListedWorker(Protocol):
    """What a directory wants of a worker."""

    @property
    def role(self) -> registry_pb2.WorkerRole: ...

    def record(self) -> registry_pb2.WorkerRecord: ...


class StaticDirectory:
    """A registry without Redis: the workers that a test puts there."""

    def __init__(self, *workers: ListedWorker) -> None:
        self.is_stale = False
        self.members = list(workers)
        self._callbacks: list[Callable[[], None]] = []

    def workers(self, role: registry_pb2.WorkerRole) -> list[registry_pb2.WorkerRecord]:
        return [worker.record() for worker in self.members if worker.role == role]

    def on_change(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def changed(self) -> None:
        for callback in self._callbacks:
            callback()


@asynccontextmanager
async def running(*workers: FakeWorker) -> AsyncIterator[None]:
    """Start workers; on exit those that still live end."""
    for worker in workers:
        await worker.start()
    try:
        yield
    finally:
        for worker in workers:
            await worker.die()
