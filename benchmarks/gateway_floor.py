"""The least that a gateway does: the same messages through the same libraries, and nothing else.

It asks the workers as a gateway does and answers each token with constant bytes. Nothing is
checked, tokenised, detokenised, counted, traced or recovered: what a gateway costs beyond it is
its own work.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import grpc
import msgspec
from grpc import aio
from starlette.types import Receive, Scope, Send

from gateway.http.server import listening_http
from mesh.channel import open_channel
from mesh.limits import SERVER_OPTIONS
from protos.isthmus.v1 import decode_pb2, inference_pb2, prefill_pb2
from protos.isthmus.v1.decode_pb2_grpc import DecodeServiceStub
from protos.isthmus.v1.prefill_pb2_grpc import PrefillServiceStub
from protos.isthmus.v1.sampling_pb2 import SamplingParams

HTTP_CHUNK = (
    b'data: {"id":"chatcmpl-0123456789abcdef0123456789abcdef","object":"chat.completion.chunk",'
    b'"created":1700000000,"model":"fake-model","choices":[{"index":0,"delta":{"content":"a"},'
    b'"logprobs":null,"finish_reason":null}]}\n\n'
)
HTTP_END = b"data: [DONE]\n\n"
GRPC_CHUNK = inference_pb2.ChatResponse(
    request_id="0123456789abcdef0123456789abcdef",
    deltas=[inference_pb2.Delta(text="a", token_ids=[97])],
).SerializeToString()
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"text/event-stream; charset=utf-8")],
}


class Floor:
    """Passes the tokens of both workers on; made by `floor_over`."""

    def __init__(
        self, prefill: PrefillServiceStub, *, decode_address: str, prompt: Sequence[int]
    ) -> None:
        self.outgoing: asyncio.Queue[decode_pb2.ServeRequest] = asyncio.Queue()
        self._prefill = prefill
        self._decode_address = decode_address
        self._prompt = prompt
        self._tokens: dict[str, asyncio.Queue[int]] = {}
        self._numbers = itertools.count()

    async def answer(self, max_tokens: int) -> AsyncIterator[bool]:
        """One item a token: whether it is the last."""
        request_id = f"{next(self._numbers):034d}"
        tokens = self._tokens[request_id] = asyncio.Queue()
        sampling = SamplingParams(max_tokens=max_tokens, seed=1)
        self.outgoing.put_nowait(
            decode_pb2.ServeRequest(
                submit=decode_pb2.SubmitSequence(
                    request_id=request_id, prompt_token_ids=self._prompt, sampling=sampling
                )
            )
        )
        call = self._prefill.Prefill(
            prefill_pb2.PrefillRequest(
                request_id=request_id,
                prompt_token_ids=self._prompt,
                sampling=sampling,
                decode_worker_id="d0",
                decode_address=self._decode_address,
            )
        )
        await call.read()
        yield max_tokens == 1
        for count in range(2, max_tokens + 1):
            await tokens.get()
            yield count == max_tokens
        del self._tokens[request_id]
        while await call.read() is not aio.EOF:
            pass

    async def follow(self, decode: DecodeServiceStub) -> None:
        """Hand out what the decode worker sends."""
        call = decode.Serve(_drained(self.outgoing))
        while isinstance(response := await call.read(), decode_pb2.ServeResponse):
            for output in response.outputs:
                self._tokens[output.request_id].put_nowait(output.token.token_id)

    async def http(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: any POST is a chat."""
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        await send(_START)
        async for is_last in self.answer(msgspec.json.decode(body)["max_tokens"]):
            chunk = HTTP_CHUNK + HTTP_END if is_last else HTTP_CHUNK
            await send({"type": "http.response.body", "body": chunk, "more_body": not is_last})

    async def chat(self, request: bytes, context: "aio.ServicerContext[bytes, bytes]") -> None:
        """isthmus.v1.Inference/Chat."""
        asked = inference_pb2.ChatRequest.FromString(request)
        async for _ in self.answer(asked.sampling.max_tokens):
            await context.write(GRPC_CHUNK)


@asynccontextmanager
async def floor_over(
    prefill_address: str, decode_address: str, *, prompt: Sequence[int]
) -> AsyncIterator[dict[str, str]]:
    """Serve inside the block, yielding each door's address; every prompt is taken for `prompt`."""
    async with (
        open_channel(prefill_address) as to_prefill,
        open_channel(decode_address) as to_decode,
        asyncio.TaskGroup() as tasks,
    ):
        floor = Floor(PrefillServiceStub(to_prefill), decode_address=decode_address, prompt=prompt)
        following = tasks.create_task(floor.follow(DecodeServiceStub(to_decode)), name="decode")
        server = aio.server(options=SERVER_OPTIONS)
        chat: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(floor.chat)
        handler = grpc.method_handlers_generic_handler("isthmus.v1.Inference", {"Chat": chat})
        server.add_generic_rpc_handlers((handler,))
        grpc_port = server.add_insecure_port("127.0.0.1:0")
        await server.start()

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await floor.http(scope, receive, send)

        async with listening_http(app, host="127.0.0.1", port=0, drain_grace_s=1) as http_port:
            yield {"http": f"127.0.0.1:{http_port}", "grpc": f"127.0.0.1:{grpc_port}"}
        await server.stop(None)
        following.cancel()


async def _drained(
    queue: asyncio.Queue[decode_pb2.ServeRequest],
) -> AsyncIterator[decode_pb2.ServeRequest]:
    while True:
        yield await queue.get()
