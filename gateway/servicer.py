"""The public gRPC service, isthmus.v1.Inference, over the core it shares with the HTTP door."""

from collections.abc import Sequence
from typing import Any

from grpc import aio

from engine.errors import InvalidRequestError
from gateway.generation import Delta, Generation
from gateway.service import InferenceService, RequestContext
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc


class InferenceServicer(inference_pb2_grpc.InferenceServicer):
    """Each call is convert, one use of the core, convert back."""

    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def Generate(
        self,
        request: pb.GenerateRequest,
        context: aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse],
    ) -> None:
        """Continue a prompt; a cancelled call frees everything on the workers."""
        async with self._service.request(_headers(context)) as known:
            self._service.check_model(request.model)
            prompt = await self._prompt(request)
            async with self._service.generating(known, [prompt], request.sampling) as generation:
                if request.echo:
                    await context.write(self._echo(request, known))
                await _write_answers(context, pb.GenerateResponse, generation)

    async def Chat(
        self,
        request: pb.ChatRequest,
        context: aio.ServicerContext[pb.ChatRequest, pb.ChatResponse],
    ) -> None:
        """Answer a conversation; a cancelled call frees everything on the workers."""
        async with self._service.request(_headers(context)) as known:
            self._service.check_model(request.model)
            prompt = await self._service.tokenise_chat([_message(m) for m in request.messages])
            async with self._service.generating(known, [prompt], request.sampling) as generation:
                await _write_answers(context, pb.ChatResponse, generation)

    async def Tokenize(
        self,
        request: pb.TokenizeRequest,
        context: aio.ServicerContext[pb.TokenizeRequest, pb.TokenizeResponse],
    ) -> pb.TokenizeResponse:
        self._service.check_model(request.model)
        token_ids = await self._service.tokenizer.encode(
            request.text, add_special_tokens=request.add_special_tokens
        )
        return pb.TokenizeResponse(token_ids=token_ids)

    async def Detokenize(
        self,
        request: pb.DetokenizeRequest,
        context: aio.ServicerContext[pb.DetokenizeRequest, pb.DetokenizeResponse],
    ) -> pb.DetokenizeResponse:
        self._service.check_model(request.model)
        self._service.check_ids(request.token_ids, "token_ids")
        return pb.DetokenizeResponse(text=self._service.tokenizer.decode(request.token_ids))

    async def ListModels(
        self,
        request: pb.ListModelsRequest,
        context: aio.ServicerContext[pb.ListModelsRequest, pb.ListModelsResponse],
    ) -> pb.ListModelsResponse:
        model = pb.Model(
            id=self._service.model_id,
            max_context_tokens=self._service.pools.max_context_tokens,
        )
        return pb.ListModelsResponse(models=[model])

    async def _prompt(self, request: pb.GenerateRequest) -> list[int]:
        if request.WhichOneof("prompt") == "text":
            return await self._service.tokenise(request.text, add_special_tokens=True)
        if request.WhichOneof("prompt") == "token_ids":
            self._service.check_ids(request.token_ids.ids, "prompt")
            return list(request.token_ids.ids)
        raise InvalidRequestError("prompt must be set: text or token_ids")

    def _echo(self, request: pb.GenerateRequest, known: RequestContext) -> pb.GenerateResponse:
        text = request.text or self._service.tokenizer.decode(request.token_ids.ids)
        answers = range(request.sampling.n or 1)
        return pb.GenerateResponse(
            request_id=known.request_id,
            deltas=[pb.Delta(index=index, text=text) for index in answers],
        )


async def _write_answers(
    context: "aio.ServicerContext[Any, Any]",
    response: type[pb.GenerateResponse | pb.ChatResponse],
    generation: Generation,
) -> None:
    """A message for each batch of deltas; the last one carries usage and report."""
    request_id = generation.work.request_id
    deltas: list[pb.Delta] = []
    while found := await generation.next():
        deltas = _to_pb(found)
        if not generation.is_settled:
            await context.write(response(request_id=request_id, deltas=deltas))
            deltas = []
    await context.write(
        response(
            request_id=request_id,
            deltas=deltas,
            usage=generation.usage(),
            report=generation.report(),
        )
    )


def _headers(context: "aio.ServicerContext[Any, Any]") -> dict[str, str]:
    metadata = context.invocation_metadata() or ()
    return {key: value for key, value in metadata if isinstance(value, str)}


def _message(message: pb.ChatMessage) -> dict[str, object]:
    found: dict[str, object] = {"role": message.role, "content": message.content}
    if message.name:
        found["name"] = message.name
    return found


def _to_pb(deltas: Sequence[Delta]) -> list[pb.Delta]:
    return [
        pb.Delta(
            index=delta.index,
            text=delta.text,
            token_ids=delta.token_ids,
            logprobs=delta.logprobs,
            finish_reason=delta.finish_reason,
        )
        for delta in deltas
    ]
