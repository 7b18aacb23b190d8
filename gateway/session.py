"""The life of one sequence: where it runs, what it emitted, where it goes on if a worker fails."""

import asyncio
import logging
import re
from dataclasses import dataclass, field
from typing import Protocol

from engine.errors import (
    CapacityError,
    DeadlineError,
    InvalidRequestError,
    IsthmusError,
    KvLeaseLostError,
    NotReadyError,
    PeerUnavailableError,
    UnknownRequestError,
)
from gateway.pools import Route, WorkerPools
from gateway.prefill_client import PrefillGoneError
from mesh.status import error_from_status
from protos.isthmus.v1.decode_pb2 import (
    DecodedToken,
    FirstStepReport,
    SequenceOutput,
    SubmitSequence,
)
from protos.isthmus.v1.prefill_pb2 import (
    FirstToken,
    HandoverReport,
    PrefillRequest,
    PrefillResponse,
)
from protos.isthmus.v1.sampling_pb2 import SamplingParams

logger = logging.getLogger(__name__)

FINAL = (InvalidRequestError, UnknownRequestError, DeadlineError)
"""Errors that another worker would answer with, too."""

BLAMES_DECODE = (PeerUnavailableError, KvLeaseLostError, NotReadyError)
"""Errors of a prefill worker that most often mean its peer, the decode worker."""

AnyToken = FirstToken | DecodedToken


@dataclass(frozen=True, kw_only=True, slots=True)
class RecoveryConfig:
    """How hard the gateway tries to keep a sequence alive."""

    max_num_attempts: int = 5
    """Times a sequence is placed on workers, the first time included."""
    wait_for_worker_s: float = 20.0
    """How long an accepted sequence waits for a decode worker to come back."""
    retry_delay_s: float = 0.05
    """Before a worker that failed the sequence gets it again; doubles each time."""
    blame_delay_s: float = 0.05
    """How long a prefill worker's failure to hand over waits for news of the decode worker."""

    def __post_init__(self) -> None:
        if self.max_num_attempts < 1:
            raise ValueError(f"max_num_attempts must be at least 1, got {self.max_num_attempts}")
        for name in ("wait_for_worker_s", "retry_delay_s", "blame_delay_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceWork:
    """What is to be computed."""

    sequence_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    traceparent: str


class SessionOwner(Protocol):
    """Takes what becomes of a sequence; called on the loop, must not raise."""

    def on_token(self, token: AnyToken) -> bool:
        """A new token, each once and in order; returns False when no more are wanted."""

    def on_failed(self, error: IsthmusError) -> None:
        """The sequence has ended without its last token."""

    def on_degraded(self, kind: str, reason: str) -> None:
        """The sequence left the best path."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One placement of the sequence on workers."""

    request_id: str
    route: Route
    needs_first: bool
    """The first token comes from the prefill worker and has not come yet."""
    held: list[DecodedToken] = field(default_factory=list)
    """Decoded tokens that overtook the first one."""
    has_decoded: bool = False
    is_handed_over: bool = False
    prefill_task: asyncio.Task[None] | None = None
    counts_for_prefill: bool = False

    def release_prefill(self) -> None:
        """Take the prompt off the prefill worker's load, once."""
        if self.counts_for_prefill and self.route.prefill is not None:
            self.route.prefill.book.remove(self.route.num_tokens)
            self.counts_for_prefill = False


@dataclass(slots=True)
class SessionReport:
    """What the workers said of a sequence, of the last attempt that said it."""

    first_token: FirstToken | None = None
    handover: HandoverReport | None = None
    first_step: FirstStepReport | None = None


class SequenceSession:
    """Places a sequence on workers and moves it elsewhere when they fail.

    What has been emitted is kept, so that a new attempt continues behind it: the owner sees each
    token once. Every attempt has its own request id, so that nothing late is taken for its own.
    """

    def __init__(
        self,
        work: SequenceWork,
        owner: SessionOwner,
        *,
        pools: WorkerPools,
        tasks: asyncio.TaskGroup,
        config: RecoveryConfig,
    ) -> None:
        self.emitted: list[int] = []
        self.report = SessionReport()
        self.is_done = False
        self.attempt: Attempt | None = None
        self._work = work
        self._owner = owner
        self._pools = pools
        self._tasks = tasks
        self._config = config
        self._avoid: set[str] = set()
        self._num_attempts = 0
        self._recovery: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Place the sequence.

        Raises:
            NotReadyError: no decode worker is there.
        """
        self._launch()

    def abort(self) -> None:
        """The owner wants no more: free what the workers hold. Harmless when ended."""
        if self.is_done:
            return
        self.is_done = True
        if self._recovery is not None:
            self._recovery.cancel()
        self._withdraw()

    @property
    def awaits_report(self) -> bool:
        """True while the prefill worker's last word on the sequence is still due."""
        task = self.attempt.prefill_task if self.attempt is not None else None
        return task is not None and not task.done()

    async def reported(self, timeout_s: float) -> None:
        """Wait for the prefill worker's last word on an ended sequence, if it is still due."""
        if self.awaits_report:
            assert self.attempt is not None
            assert self.attempt.prefill_task is not None
            await asyncio.wait([self.attempt.prefill_task], timeout=timeout_s)

    # What the decode worker says.

    def on_decode_output(self, request_id: str, output: SequenceOutput) -> None:
        attempt = self._current(request_id)
        if attempt is None:
            return
        match output.WhichOneof("event"):
            case "token":
                self._on_decoded(attempt, output.token)
            case "degraded":
                self._owner.on_degraded(output.degraded.kind, output.degraded.reason)
            case "error":
                error = error_from_status(output.error.status_code, output.error.message)
                self._on_lost(attempt, error, attempt.route.decode.record.worker_id)
            case "aborted":
                error = KvLeaseLostError("the decode worker dropped the sequence")
                self._on_lost(attempt, error, attempt.route.decode.record.worker_id)

    def on_decode_lost(self, request_id: str, error: IsthmusError) -> None:
        attempt = self._current(request_id)
        if attempt is not None:
            self._on_lost(attempt, error, attempt.route.decode.record.worker_id)

    def _on_decoded(self, attempt: Attempt, token: DecodedToken) -> None:
        if token.HasField("first_step"):
            self.report.first_step = token.first_step
        attempt.has_decoded = True
        if attempt.needs_first:
            attempt.held.append(token)
        else:
            self._accept(token)

    # What the prefill worker says.

    async def _prefill(self, attempt: Attempt, submitted: SubmitSequence) -> None:
        worker = attempt.route.prefill
        assert worker is not None, attempt.request_id
        decode = attempt.route.decode.record
        # Ids of one message are copied into another without becoming Python integers.
        request = PrefillRequest(
            request_id=attempt.request_id,
            prompt_token_ids=submitted.prompt_token_ids,
            output_token_ids=submitted.output_token_ids,
            sampling=submitted.sampling,
            decode_worker_id=decode.worker_id,
            decode_address=decode.address,
        )
        error: IsthmusError | None = None
        try:
            async with worker.client.prefill(request, self._work.traceparent) as responses:
                async for response in responses:
                    self._on_prefill_response(attempt, response)
        except IsthmusError as failure:
            error = failure
        finally:
            attempt.release_prefill()
        if isinstance(error, BLAMES_DECODE) and not isinstance(error, PrefillGoneError):
            # If decode is gone its stream says so in a moment, and that ends this task.
            await asyncio.sleep(self._config.blame_delay_s)
        self._on_prefill_end(attempt, error)

    def _on_prefill_response(self, attempt: Attempt, response: PrefillResponse) -> None:
        if response.HasField("handover"):
            attempt.is_handed_over = True
            self.report.handover = response.handover
            for reason in response.handover.retransfers:
                self._owner.on_degraded("retransfer", reason)
        if self.attempt is not attempt or self.is_done or not attempt.needs_first:
            return
        if response.HasField("first_token"):
            attempt.needs_first = False
            attempt.release_prefill()
            self.report.first_token = response.first_token
            if reason := response.first_token.fetch_failure:
                self._owner.on_degraded("prefix_fetch", reason)
            self._accept(response.first_token)
            for token in attempt.held:
                if not self.is_done:
                    self._accept(token)

    def _on_prefill_end(self, attempt: Attempt, error: IsthmusError | None) -> None:
        """A failure after the KV has arrived (the decode worker decodes) is none."""
        if self.attempt is not attempt or self.is_done:
            return
        if not attempt.needs_first and (attempt.has_decoded or attempt.is_handed_over):
            return
        worker = attempt.route.prefill
        assert worker is not None, attempt.request_id
        error = error or KvLeaseLostError("the prefill worker ended before the handover")
        self._on_lost(attempt, error, worker.record.worker_id)

    # Moves.

    def _launch(self) -> None:
        num_tokens = len(self._work.prompt_token_ids) + len(self.emitted)
        route = self._pools.route(num_tokens, avoid=self._avoid)
        self._num_attempts += 1
        attempt = self.attempt = Attempt(
            request_id=f"{self._work.sequence_id}.{self._num_attempts}",
            route=route,
            needs_first=route.prefill is not None,
            counts_for_prefill=route.prefill is not None,
        )
        submit = SubmitSequence(
            request_id=attempt.request_id,
            prompt_token_ids=self._work.prompt_token_ids,
            output_token_ids=self.emitted,
            sampling=self._work.sampling,
            prefill_locally=route.prefill is None,
            traceparent=self._work.traceparent,
        )
        route.decode.stream.submit(submit, self)
        if route.prefill is not None:
            attempt.prefill_task = self._tasks.create_task(
                self._prefill(attempt, submit), name=f"prefill-{attempt.request_id}"
            )
        else:
            has_failed = not self._avoid.isdisjoint(self._pools.prefill)
            reason = "prefill_failed" if has_failed else "no_prefill_worker"
            self._owner.on_degraded("local_prefill", reason)
        if self._pools.source.is_stale and self._num_attempts == 1:
            self._owner.on_degraded("stale_registry", "redis_unreachable")

    def _accept(self, token: AnyToken) -> None:
        self.emitted.append(token.token_id)
        wants_more = self._owner.on_token(token)
        if token.finish_reason:
            self._finish(token)
        elif not wants_more:
            self.abort()

    def _finish(self, token: AnyToken) -> None:
        self.is_done = True
        attempt = self.attempt
        assert attempt is not None, "a token without an attempt"
        if isinstance(token, FirstToken):  # the decode worker still waits for the handover
            attempt.route.decode.stream.abort(attempt.request_id)
        self._release(attempt)

    def _on_lost(self, attempt: Attempt, error: IsthmusError, worker_id: str) -> None:
        """An attempt has failed at a worker: start another one behind what was emitted."""
        logger.warning("sequence lost request_id=%s: %s", attempt.request_id, error)
        is_decode = worker_id == attempt.route.decode.record.worker_id
        self._withdraw()
        self._avoid.add(worker_id)
        is_full = isinstance(error, CapacityError) and is_decode and not self.emitted
        has_other = any(other not in self._avoid for other in self._pools.decode)
        if (
            isinstance(error, FINAL)
            or self._num_attempts >= self._config.max_num_attempts
            or (is_full and not has_other)
        ):
            self._fail(error)
            return
        kind = "migration" if is_decode and self.emitted else "retry"
        self._owner.on_degraded(kind, reason_of(error))
        self._recovery = self._tasks.create_task(
            self._recover(error, is_patient=is_decode and not has_other),
            name=f"recover-{attempt.request_id}",
        )

    async def _recover(self, error: IsthmusError, *, is_patient: bool) -> None:
        """Place the sequence again; an accepted one waits for a decode worker to come back."""
        if is_patient:
            await asyncio.sleep(self._config.retry_delay_s * 2 ** (self._num_attempts - 1))
        try:
            async with asyncio.timeout(self._config.wait_for_worker_s):
                while True:
                    try:
                        self._launch()
                    except NotReadyError as not_ready:
                        error = not_ready
                    else:
                        return
                    await self._pools.wait_for_change()
        except TimeoutError:
            self._fail(error)

    def _fail(self, error: IsthmusError) -> None:
        self.is_done = True
        self._owner.on_failed(error)

    def _withdraw(self) -> None:
        """Abort the current attempt on both workers; the answers are waited for elsewhere."""
        attempt, self.attempt = self.attempt, None
        if attempt is None:
            return
        attempt.route.decode.stream.abort(attempt.request_id)
        task, worker = attempt.prefill_task, attempt.route.prefill
        if worker is not None and task is not None and not task.done():
            task.cancel()
            self._tasks.create_task(
                worker.client.abort(attempt.request_id), name=f"abort-{attempt.request_id}"
            )
        self._release(attempt)

    def _release(self, attempt: Attempt) -> None:
        attempt.release_prefill()
        attempt.route.decode.book.remove(attempt.route.num_tokens)

    def _current(self, request_id: str) -> Attempt | None:
        attempt = self.attempt
        if self.is_done or attempt is None or attempt.request_id != request_id:
            return None
        return attempt


def reason_of(error: IsthmusError) -> str:
    """The error's class as a metric label: PeerUnavailableError is peer_unavailable."""
    if isinstance(error, PrefillGoneError):
        return "peer_unavailable"
    name = type(error).__name__.removesuffix("Error") or "Error"
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
