"""The core that both doors share: tokenise, check, admit, generate."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from opentelemetry import trace
from opentelemetry.trace import Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from engine.errors import CapacityError, InvalidRequestError, NotReadyError, UnknownRequestError
from gateway.admission import Admission
from gateway.chat_template import ChatTemplate
from gateway.generation import ClientGoneError, Generation, GenerationWork
from gateway.metrics import GatewayMetrics
from gateway.parameters import (
    ParameterError,
    UnknownModelError,
    check_ids,
    checked_sampling,
)
from gateway.pools import WorkerPools
from gateway.session import RecoveryConfig, SequenceSession, SequenceWork, SessionOwner
from gateway.tokenizer import Tokenizer
from mesh.telemetry import child_span
from protos.isthmus.v1 import sampling_pb2

MAX_CHARS_PER_TOKEN = 128
"""A text with more characters than this for each token of the context is refused unseen."""

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestContext:
    """A request on its way through the gateway."""

    request_id: str
    span: Span
    arrived_ns: int


class InferenceService:
    """Answers prompts with the workers of the mesh; loop only."""

    def __init__(
        self,
        *,
        model_id: str,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        pools: WorkerPools,
        admission: Admission,
        metrics: GatewayMetrics,
        recovery: RecoveryConfig,
        tasks: asyncio.TaskGroup,
        tracer: Tracer | None = None,
    ) -> None:
        self.model_id = model_id
        self.tokenizer = tokenizer
        self.pools = pools
        self.admission = admission
        self.metrics = metrics
        self._chat_template = chat_template
        self._recovery = recovery
        self._tasks = tasks
        self._tracer = tracer or trace.get_tracer("isthmus.gateway")

    @asynccontextmanager
    async def request(
        self, headers: Mapping[str, str], *, request_id: str = ""
    ) -> AsyncIterator[RequestContext]:
        """Count and trace one request; errors raised inside set its outcome."""
        arrived_ns = time.perf_counter_ns()
        request_id = request_id or uuid.uuid4().hex
        parent = _PROPAGATOR.extract(dict(headers)) if "traceparent" in headers else None
        outcome = "ok"
        self.metrics.requests_in_flight.inc()
        await self.pools.settled()
        with self._tracer.start_as_current_span(
            "request", context=parent, attributes={"request_id": request_id}
        ) as span:
            try:
                yield RequestContext(request_id=request_id, span=span, arrived_ns=arrived_ns)
            except BaseException as error:
                outcome = _outcome_of(error)
                raise
            finally:
                span.set_attribute("outcome", outcome)
                self.metrics.requests_in_flight.dec()
                self.metrics.requests.labels(outcome).inc()

    def check_model(self, model: str | None) -> None:
        """Raises UnknownModelError unless `model` is the one served, or none is named."""
        if model and model != self.model_id:
            raise UnknownModelError(
                f"The model '{model}' does not exist here; this gateway serves '{self.model_id}'."
            )

    def check_ids(self, token_ids: Sequence[int], param: str) -> None:
        """Raises ParameterError unless all ids are in the vocabulary."""
        check_ids(token_ids, self.tokenizer.num_tokens, param)

    @property
    def max_context_tokens(self) -> int:
        """Raises NotReadyError while no decode worker is there to say."""
        if not self.pools.max_context_tokens:
            self.pools.check_ready()
        return self.pools.max_context_tokens

    async def tokenise(
        self, text: str, *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[int]:
        """The ids of a prompt.

        Raises:
            ParameterError: the text is empty or far too long for the context.
        """
        if not text:
            raise ParameterError(f"{param} must not be empty", param=param)
        max_chars = self.max_context_tokens * MAX_CHARS_PER_TOKEN
        if len(text) > max_chars:
            raise ParameterError(
                f"This model's maximum context length is {self.max_context_tokens} tokens; "
                f"{param} has {len(text)} characters, which cannot fit. Please shorten it.",
                param=param,
                code="context_length_exceeded",
            )
        with child_span(self._tracer, "tokenise") as span:
            token_ids = await self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
            span.set_attribute("num_tokens", len(token_ids))
        if not token_ids:
            raise ParameterError(f"{param} holds no token", param=param)
        return token_ids

    async def tokenise_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        variables: Mapping[str, object] | None = None,
    ) -> list[int]:
        """The ids of a conversation, through the model's chat template.

        Raises:
            InvalidRequestError: no messages, or the template does not take them.
        """
        if not messages:
            raise ParameterError("messages must not be empty", param="messages")
        if self._chat_template is None:
            raise ParameterError(
                "this model has no chat template; send a prompt to completions instead",
                param="messages",
            )
        text = self._chat_template.render(messages, variables=variables)
        return await self.tokenise(text, add_special_tokens=False, param="messages")

    @asynccontextmanager
    async def generating(
        self,
        context: RequestContext,
        prompts: list[list[int]],
        sampling: sampling_pb2.SamplingParams,
        *,
        default_max_tokens: int | None = None,
    ) -> AsyncIterator[Generation]:
        """Answer prompts inside the block; leaving it early frees everything on the workers.

        Args:
            context: of the request.
            prompts: ids from `tokenise`, or the caller's own that `check_ids` has passed.
            sampling: as the caller sent it.
            default_max_tokens: None: what the context leaves.

        Raises:
            InvalidRequestError: a parameter is out of range or the context is too short.
            CapacityError: too many sequences are open.
            NotReadyError: no decode worker is there.
        """
        if not all(prompts):
            raise ParameterError("prompt must not be empty", param="prompt")
        checked = checked_sampling(
            sampling,
            num_prompt_tokens=max(map(len, prompts)),
            max_context_tokens=self.max_context_tokens,
            num_vocabulary_tokens=self.tokenizer.num_tokens,
            default_max_tokens=default_max_tokens,
        )
        work = GenerationWork(
            request_id=context.request_id,
            prompts=prompts,
            sampling=checked,
            traceparent=_traceparent(context.span),
            arrived_ns=context.arrived_ns,
        )
        with self.admission.admitted(len(prompts) * checked.num_answers):
            generation = Generation(
                work,
                token_bytes=self.tokenizer.token_bytes,
                new_session=self._new_session,
                metrics=self.metrics,
                span=context.span,
            )
            try:
                with child_span(self._tracer, "route"):
                    generation.start()
                self.metrics.prompt_tokens.inc(sum(map(len, prompts)))
                yield generation
            finally:
                generation.close()
                self.metrics.completion_tokens.inc(generation.usage().num_completion_tokens)

    def _new_session(self, work: SequenceWork, owner: SessionOwner) -> SequenceSession:
        return SequenceSession(
            work, owner, pools=self.pools, tasks=self._tasks, config=self._recovery
        )


def _traceparent(span: Span) -> str:
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier, trace.set_span_in_context(span))
    return carrier.get("traceparent", "")


def _outcome_of(error: BaseException) -> str:
    """A label of few values."""
    if isinstance(error, InvalidRequestError | UnknownRequestError):
        return "invalid"
    if isinstance(error, CapacityError):
        return "rejected"
    if isinstance(error, NotReadyError):
        return "unavailable"
    is_gone = isinstance(error, ClientGoneError) or not isinstance(error, Exception)
    return "cancelled" if is_gone else "error"
