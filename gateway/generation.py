"""One admitted request: its answers, what they gained since last asked, and its report."""

import asyncio
import time
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.trace import Span

from engine.errors import IsthmusError
from gateway.detokenizer import Detokenizer
from gateway.metrics import GatewayMetrics
from gateway.parameters import Sampling, sampling_of_answer
from gateway.session import (
    AnyToken,
    SequenceSession,
    SequenceWork,
    SessionOwner,
    SessionReport,
)
from gateway.token_bytes import TokenBytes
from protos.isthmus.v1.inference_pb2 import Degradation, RequestReport, Usage
from protos.isthmus.v1.sampling_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    TokenLogprobs,
)

REPORT_TIMEOUT_S = 0.05
"""How long the end of a request waits for the prefill worker's handover report."""


class ClientGoneError(IsthmusError):
    """Nobody waits for the answer any more."""


@dataclass(slots=True, eq=False)
class Delta:
    """What one answer gained; `text` is whole characters only."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """One for each of `token_ids`, when asked for."""
    finish_reason: FinishReason = FINISH_REASON_UNSPECIFIED
    has_end_token: bool = False
    """The last of `token_ids` ended the answer and stands for no text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationWork:
    """A request, checked and tokenised."""

    request_id: str
    prompts: list[list[int]]
    """Token ids; each prompt gets `sampling.num_answers` answers, numbered prompt by prompt."""
    sampling: Sampling
    traceparent: str
    arrived_ns: int
    """time.perf_counter_ns() at the door."""


class SessionFactory(Protocol):
    """Makes the session of one answer."""

    def __call__(self, work: SequenceWork, owner: SessionOwner) -> SequenceSession: ...


class Generation:
    """Answers of one request as they grow; made by `InferenceService.generating`."""

    def __init__(
        self,
        work: GenerationWork,
        *,
        token_bytes: TokenBytes,
        new_session: SessionFactory,
        metrics: GatewayMetrics,
        span: Span,
    ) -> None:
        self.work = work
        self.metrics = metrics
        self.first_token_ns = 0
        self._span = span
        self._degradations: list[Degradation] = []
        self._error: IsthmusError | None = None
        self._ready: list[Delta] = []
        self._waiter: asyncio.Future[None] | None = None
        self._answers = [
            Answer(self, index, token_bytes, new_session)
            for index in range(len(work.prompts) * work.sampling.num_answers)
        ]
        self._num_open = len(self._answers)

    def start(self) -> None:
        """Place each prompt's first answer; its others follow when the prompt has been computed.

        By then it is in the prefix cache.

        Raises:
            NotReadyError: no decode worker is there.
        """
        for answer in self._answers[:: self.work.sampling.num_answers]:
            answer.session.start()

    async def next(self) -> list[Delta]:
        """What came since the last call, at least one delta; empty when all answers have ended.

        Raises:
            IsthmusError: the request cannot be finished; what came before was returned before.
        """
        while not self._ready:
            if self._error is not None:
                raise self._error
            if not self._num_open:
                await self._answers[0].session.reported(REPORT_TIMEOUT_S)
                return []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        ready, self._ready = self._ready, []
        for delta in ready:
            self._answers[delta.index].pending = None
        return ready

    def close(self) -> None:
        """Free everything that is still held for the request, on all workers."""
        for answer in self._answers:
            answer.session.abort()

    def cancel(self) -> None:
        """The client has gone away: free everything and let `next` raise ClientGoneError."""
        if not self.is_finished:
            self.on_failed(ClientGoneError("the client went away"))

    @property
    def is_finished(self) -> bool:
        return not self._num_open and self._error is None

    @property
    def is_settled(self) -> bool:
        """Finished, and `next` has nothing more to wait for: what came last may end the reply."""
        return self.is_finished and not self._ready and not self._answers[0].session.awaits_report

    def usage(self) -> Usage:
        return Usage(
            num_prompt_tokens=sum(map(len, self.work.prompts)),
            num_completion_tokens=sum(answer.num_tokens for answer in self._answers),
            num_cached_tokens=sum(
                _num_cached_tokens(answer.session.report)
                for answer in self._answers[:: self.work.sampling.num_answers]
            ),
        )

    def report(self) -> RequestReport:
        """Where the time of answer 0 went."""
        session = self._answers[0].session
        said, attempt = session.report, session.attempt
        report = RequestReport(
            time_to_first_token_ns=max(0, self.first_token_ns - self.work.arrived_ns),
            total_ns=time.perf_counter_ns() - self.work.arrived_ns,
            degradations=self._degradations,
        )
        if said.first_step is not None:
            report.first_decode_step_ns = said.first_step.step_ns
            if said.first_step.prefilled_locally:
                report.prefill_queue_ns = said.first_step.queue_ns
                report.prefill_ns = said.first_step.step_ns
        if said.first_token is not None:
            report.prefill_queue_ns = said.first_token.queue_ns
            report.prefill_ns = said.first_token.compute_ns
        if said.handover is not None:
            report.handover_bytes = said.handover.num_bytes
            report.handover_ns = said.handover.transfer_ns
            report.data_plane = said.handover.data_plane
        if attempt is not None:
            report.decode_worker_id = attempt.route.decode.record.worker_id
            if attempt.route.prefill is not None:
                report.prefill_worker_id = attempt.route.prefill.record.worker_id
        return report

    # What the answers say.

    def on_first_token(self, index: int, now_ns: int) -> None:
        if not self.first_token_ns:
            self.first_token_ns = now_ns
            self.metrics.time_to_first_token_s.observe((now_ns - self.work.arrived_ns) / 1e9)
        num_answers = self.work.sampling.num_answers
        if index % num_answers == 0:
            for answer in self._answers[index + 1 : index + num_answers]:
                answer.start()

    def on_delta(self, delta: Delta) -> None:
        self._ready.append(delta)
        self._wake()

    def on_end(self) -> None:
        self._num_open -= 1

    def on_failed(self, error: IsthmusError) -> None:
        """One answer failing fails the request: n answers were asked for."""
        self._error = self._error or error
        self.close()
        self._wake()

    def on_degraded(self, kind: str, reason: str) -> None:
        self._degradations.append(Degradation(kind=kind, reason=reason))
        self.metrics.degradations.labels(kind, reason).inc()
        self._span.add_event("degraded", {"kind": kind, "reason": reason})

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Answer:
    """One of the n answers: its session's tokens become text here."""

    def __init__(
        self,
        generation: Generation,
        index: int,
        token_bytes: TokenBytes,
        new_session: SessionFactory,
    ) -> None:
        work = generation.work
        prompt_index, answer_index = divmod(index, work.sampling.num_answers)
        self.index = index
        self.num_tokens = 0
        self.pending: Delta | None = None
        """Handed to the generation, not yet taken by the door: it may still grow."""
        self._generation = generation
        self._detokenizer = Detokenizer(token_bytes, work.sampling.stops)
        self._wants_logprobs = work.sampling.worker.HasField("num_top_logprobs")
        self._last_token_ns = 0
        self.session = new_session(
            SequenceWork(
                sequence_id=f"{work.request_id}-{index}",
                prompt_token_ids=work.prompts[prompt_index],
                sampling=sampling_of_answer(work.sampling.worker, answer_index),
                traceparent=work.traceparent,
            ),
            self,
        )

    def start(self) -> None:
        try:
            self.session.start()
        except IsthmusError as error:
            self._generation.on_failed(error)

    def on_token(self, token: AnyToken) -> bool:
        self._observe_time()
        self.num_tokens += 1
        delta = self._delta()
        delta.token_ids.append(token.token_id)
        if self._wants_logprobs:
            delta.logprobs.append(token.logprobs)
        reason = token.finish_reason
        if reason == FINISH_REASON_STOP:  # an end token: it stands for no text
            delta.has_end_token = True
            delta.text += self._detokenizer.finish()
        else:
            delta.text += self._detokenizer.push(token.token_id)
            if reason:
                delta.text += self._detokenizer.finish()
            if self._detokenizer.is_stopped:
                reason = FINISH_REASON_STOP
        if reason:
            delta.finish_reason = reason
            self._generation.on_end()
        return not reason

    def on_failed(self, error: IsthmusError) -> None:
        self._generation.on_failed(error)

    def on_degraded(self, kind: str, reason: str) -> None:
        self._generation.on_degraded(kind, reason)

    def _delta(self) -> Delta:
        delta = self.pending
        if delta is None:
            delta = self.pending = Delta(self.index)
            self._generation.on_delta(delta)
        return delta

    def _observe_time(self) -> None:
        now_ns = time.perf_counter_ns()
        if self._last_token_ns:
            elapsed_s = (now_ns - self._last_token_ns) / 1e9
            self._generation.metrics.inter_token_latency_s.observe(elapsed_s)
        else:
            self._generation.on_first_token(self.index, now_ns)
        self._last_token_ns = now_ns


def _num_cached_tokens(said: SessionReport) -> int:
    if said.first_token is not None:
        return said.first_token.num_cached_tokens
    return said.first_step.num_cached_tokens if said.first_step is not None else 0
