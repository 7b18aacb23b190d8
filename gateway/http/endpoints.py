"""POST /v1/chat/completions and /v1/completions, as plain ASGI applications."""

import asyncio
import re
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import msgspec
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from gateway.generation import ClientGoneError, Delta, Generation
from gateway.http.body import decoded, read_body
from gateway.http.errors import reply_of
from gateway.http.forms import ChatForm, CompletionForm, Form, new_head
from gateway.http.response import ResponseWriter
from gateway.http.schemas import ChatCompletionRequest, CompletionRequest
from gateway.parameters import ParameterError
from gateway.service import InferenceService, RequestContext
from protos.isthmus.v1.sampling_pb2 import SamplingParams

MAX_PROMPTS = 64
COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for completions; chat takes what the context leaves."""

_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request, read and tokenised."""

    prompts: list[list[int]]
    sampling: SamplingParams
    default_max_tokens: int | None
    is_streamed: bool
    form: Form


class GenerationEndpoint(ABC):
    """Reads a request, answers it whole or streamed, and frees all when the client goes away."""

    def __init__(self, service: InferenceService) -> None:
        self.service = service

    @abstractmethod
    async def plan(self, body: bytes, context: RequestContext, *, wants_report: bool) -> Plan:
        """Read the body; raises InvalidRequestError naming what is wrong with it."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        request_id = request_id_from(headers)
        writer = ResponseWriter(send, request_id)
        try:
            async with self.service.request(headers, request_id=request_id) as context:
                body = await read_body(scope, receive)
                wants_report = headers.get("x-isthmus-report", "0") not in {"", "0", "false"}
                plan = await self.plan(body, context, wants_report=wants_report)
                await self._answer(plan, context, receive, writer)
        except ClientGoneError:
            return
        except Exception as error:  # noqa: BLE001 - the last frame of the request
            await writer.fail(reply_of(error))

    async def _answer(
        self, plan: Plan, context: RequestContext, receive: Receive, writer: ResponseWriter
    ) -> None:
        async with (
            self.service.generating(
                context, plan.prompts, plan.sampling, default_max_tokens=plan.default_max_tokens
            ) as generation,
            cancelled_when_gone(receive, generation),
        ):
            if plan.is_streamed:
                events = b""
                while deltas := await generation.next():
                    events = plan.form.chunks(deltas)
                    if events and not generation.is_settled:
                        await writer.events(events)
                        events = b""
                await writer.events(events + plan.form.closing(generation), is_last=True)
            else:
                deltas = await collected(generation)
                await writer.body(plan.form.whole(deltas, generation))


class ChatCompletions(GenerationEndpoint):
    _decoder = msgspec.json.Decoder(ChatCompletionRequest)

    async def plan(self, body: bytes, context: RequestContext, *, wants_report: bool) -> Plan:
        request = decoded(body, self._decoder)
        self.service.check_model(request.model)
        sampling = request.sampling()
        prompt = await self.service.tokenise_chat(
            [message.for_template(index) for index, message in enumerate(request.messages)],
            request.chat_template_kwargs,
        )
        is_streamed = bool(request.stream)
        kind = "chat.completion.chunk" if is_streamed else "chat.completion"
        form = ChatForm(
            new_head(kind, context.request_id, self.service.model_id),
            self.service.tokenizer.token_bytes,
            is_streamed=is_streamed,
            wants_usage=request.wants_usage_chunk,
            wants_report=wants_report or (request.isthmus is not None and request.isthmus.report),
        )
        return Plan(
            prompts=[prompt],
            sampling=sampling,
            default_max_tokens=None,
            is_streamed=is_streamed,
            form=form,
        )


class Completions(GenerationEndpoint):
    _decoder = msgspec.json.Decoder(CompletionRequest)

    async def plan(self, body: bytes, context: RequestContext, *, wants_report: bool) -> Plan:
        request = decoded(body, self._decoder)
        self.service.check_model(request.model)
        sampling = request.sampling()
        given = request.prompts()
        if len(given) > MAX_PROMPTS:
            raise ParameterError(
                f"prompt takes at most {MAX_PROMPTS} prompts, got {len(given)}", param="prompt"
            )
        prompts = [await self._tokenised(prompt) for prompt in given]
        is_streamed = bool(request.stream)
        form = CompletionForm(
            new_head("text_completion", context.request_id, self.service.model_id),
            self.service.tokenizer.token_bytes,
            echoes=self._echoes(given, request.n or 1) if request.echo else (),
            is_streamed=is_streamed,
            wants_usage=request.wants_usage_chunk,
            wants_report=wants_report or (request.isthmus is not None and request.isthmus.report),
        )
        return Plan(
            prompts=prompts,
            sampling=sampling,
            default_max_tokens=COMPLETION_MAX_TOKENS,
            is_streamed=is_streamed,
            form=form,
        )

    async def _tokenised(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return await self.service.tokenise(prompt, add_special_tokens=True)
        self.service.check_ids(prompt, "prompt")
        return prompt

    def _echoes(self, prompts: list[str] | list[list[int]], num_answers: int) -> list[str]:
        texts = [
            prompt if isinstance(prompt, str) else self.service.tokenizer.decode(prompt)
            for prompt in prompts
        ]
        return [text for text in texts for _ in range(num_answers)]


def request_id_from(headers: Headers) -> str:
    """The caller's own id where it is a plain one, else a new one."""
    given = headers.get("x-request-id", "")
    return f"{given}-{uuid.uuid4().hex[:8]}" if _REQUEST_ID.match(given) else uuid.uuid4().hex


@asynccontextmanager
async def cancelled_when_gone(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Cancel `generation` as soon as the client of this request hangs up."""
    watch = asyncio.get_running_loop().create_task(_watch(receive, generation), name="watch-client")
    try:
        yield
    finally:
        watch.cancel()


async def _watch(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


async def collected(generation: Generation) -> list[Delta]:
    """Everything that each answer gained, as one delta an answer, in order."""
    whole: dict[int, Delta] = {}
    while deltas := await generation.next():
        for delta in deltas:
            so_far = whole.setdefault(delta.index, delta)
            if so_far is not delta:
                so_far.text += delta.text
                so_far.token_ids += delta.token_ids
                so_far.logprobs += delta.logprobs
                so_far.finish_reason = delta.finish_reason
                so_far.has_end_token = delta.has_end_token
    return [whole[index] for index in sorted(whole)]
