"""Bad input to a real mesh, through both doors: the right answer at once, and others go on."""

import asyncio
import json
import time
from collections.abc import AsyncIterator

import grpc
import httpx
import pytest
from grpc import aio

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.e2e.held import until_idle
from tests.e2e.mesh_process import MeshProcess

AT_ONCE_S = 5.0
"""Machines may be busy; every time-out of the mesh is longer."""
CONTEXT = 8192
CHAT, PLAIN = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hi"}]
NAN = float("nan")

# path, body (bytes are sent as they are), status, param, words of the message
HTTP: dict[str, tuple[str, object, int, str | None, str]] = {
    "empty prompt": (PLAIN, {"prompt": ""}, 400, "prompt", "empty"),
    "empty messages": (CHAT, {"messages": []}, 400, "messages", "empty"),
    "prompt over the context": (
        *(PLAIN, {"prompt": [5] * (CONTEXT + 1)}, 400, "prompt"),
        "maximum context length is 8192",
    ),
    "text over the context": (
        *(PLAIN, {"prompt": "isthmus " * 9000}, 400, "prompt"),
        "maximum context length is 8192",
    ),
    "prompt + max_tokens over the context": (
        *(PLAIN, {"prompt": [5] * 8000, "max_tokens": 193}, 400, "max_tokens"),
        "8193 tokens",
    ),
    "unknown model": (PLAIN, {"model": "gpt-9", "prompt": "a"}, 404, "model", "does not exist"),
    "unknown field": (PLAIN, {"prompt": "a", "temprature": 1}, 400, "temprature", "temprature"),
    "field of the wrong type": (
        *(CHAT, {"messages": USER, "max_tokens": "many"}, 400, "max_tokens"),
        "max_tokens",
    ),
    "NaN temperature": (
        *(PLAIN, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        "finite",
    ),
    "11 MB": (PLAIN, b'{"prompt": "' + b"x" * (11 << 20) + b'"}', 413, None, "larger than"),
    "9 MB": (PLAIN, b'{"prompt": "' + b"x" * (9 << 20) + b'"}', 400, "prompt", "characters"),
    "invalid UTF-8": (PLAIN, b'{"prompt": "\xff\xfe"}', 400, None, "UTF-8"),
    "a template that raises": (
        *(CHAT, {"messages": USER, "chat_template_kwargs": {"messages": 3}}, 400, None),
        "template",
    ),
    "n = 0": (PLAIN, {"prompt": "a", "n": 0}, 400, "n", ">= 1"),
    "unknown role": (
        *(CHAT, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages"),
        "wizard",
    ),
    "1000 stop strings": (PLAIN, {"prompt": "a", "stop": ["x"] * 1000}, 400, "stop", "at most 16"),
}

GRPC: dict[str, tuple[pb.GenerateRequest | pb.ChatRequest, grpc.StatusCode, str]] = {
    "no prompt": (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT, "prompt must be set"),
    "empty prompt": (pb.GenerateRequest(text=""), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    "empty messages": (pb.ChatRequest(), grpc.StatusCode.INVALID_ARGUMENT, "empty"),
    "prompt over the context": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5] * (CONTEXT + 1))),
        *(grpc.StatusCode.INVALID_ARGUMENT, "maximum context length is 8192"),
    ),
    "prompt + max_tokens over the context": (
        pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5] * 8000), sampling=SamplingParams(max_tokens=193)
        ),
        *(grpc.StatusCode.INVALID_ARGUMENT, "8193 tokens"),
    ),
    "max_tokens = 0": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(max_tokens=0)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
    ),
    "unknown model": (
        pb.GenerateRequest(model="gpt-9", text="a"),
        *(grpc.StatusCode.NOT_FOUND, "does not exist"),
    ),
    "NaN temperature": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(temperature=NAN)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "temperature"),
    ),
    "NaN bias": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(logit_bias={5: NAN})),
        *(grpc.StatusCode.INVALID_ARGUMENT, "logit_bias"),
    ),
    "7 MB": (
        pb.GenerateRequest(text="x" * (7 << 20)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "characters"),
    ),
    "unknown role": (
        pb.ChatRequest(messages=[pb.ChatMessage(role="wizard", content="x")]),
        *(grpc.StatusCode.INVALID_ARGUMENT, "wizard"),
    ),
    "1000 stop strings": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(stop=["x"] * 1000)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "at most 16"),
    ),
    "too many answers": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(n=17)),
        *(grpc.StatusCode.INVALID_ARGUMENT, "n must be"),
    ),
    "a token that is none": (
        pb.GenerateRequest(token_ids=pb.TokenIds(ids=[4_000_000_000])),
        *(grpc.StatusCode.INVALID_ARGUMENT, "4000000000"),
    ),
    "a stop token that is none": (
        pb.GenerateRequest(text="a", sampling=SamplingParams(stop_token_ids=[4_000_000_000])),
        *(grpc.StatusCode.INVALID_ARGUMENT, "stop_token_ids"),
    ),
}

# Field 2, a text or a message, holds bytes that are neither.
INVALID_UTF8 = b"\x12\x02\xff\xfe"
# Its length goes beyond the end; noise.
CUT_OFF, NOISE = b"\x12\x7fabc", bytes(range(200, 256))


@pytest.fixture
async def mesh(demo_mesh: MeshProcess) -> AsyncIterator[MeshProcess]:
    """Beside every test one long answer is streamed; it comes whole, and nothing is held."""
    await until_idle(demo_mesh)
    async with asyncio.TaskGroup() as tasks:
        other = tasks.create_task(stream_length(demo_mesh, num_tokens=100))
        yield demo_mesh
        assert await other == 100
    await until_idle(demo_mesh)


async def stream_length(mesh: MeshProcess, num_tokens: int) -> int:
    body = {
        "prompt": "Once upon a time",
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with (
        httpx.AsyncClient(base_url=mesh.http, timeout=120) as client,
        client.stream("POST", PLAIN, json=body) as answer,
    ):
        events = [line[6:] async for line in answer.aiter_lines() if line]
    assert events[-1] == "[DONE]"
    count: int = json.loads(events[-2])["usage"]["completion_tokens"]
    return count


async def test_http_answers_with_openais_error(mesh: MeshProcess) -> None:
    async with httpx.AsyncClient(base_url=mesh.http, timeout=60) as client:
        for name, (path, body, status, param, words) in HTTP.items():
            content = body if isinstance(body, bytes) else json.dumps(body)
            started_s = time.monotonic()
            answer = await client.post(path, content=content)
            assert time.monotonic() - started_s < AT_ONCE_S, name
            assert answer.status_code == status, f"{name}: {answer.text}"
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, name
            assert error["type"] == "invalid_request_error", name
            assert words in error["message"], f"{name}: {error['message']}"
            assert error["param"] == param or param is None, f"{name}: {error}"


async def test_grpc_answers_with_a_status_that_names_what_to_change(mesh: MeshProcess) -> None:
    async with open_channel(mesh.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for name, (request, code, words) in GRPC.items():
            call = (
                stub.Chat(request)
                if isinstance(request, pb.ChatRequest)
                else stub.Generate(request)
            )
            started_s = time.monotonic()
            with pytest.raises(aio.AioRpcError) as caught:
                await call.read()
            assert time.monotonic() - started_s < AT_ONCE_S, name
            assert caught.value.code() is code, f"{name}: {caught.value}"
            assert words in (caught.value.details() or ""), f"{name}: {caught.value.details()}"


async def test_grpc_refuses_bytes_that_are_no_message(mesh: MeshProcess) -> None:
    async with open_channel(mesh.grpc) as channel:
        for method in ("Generate", "Chat"):
            call: aio.UnaryStreamMultiCallable[bytes, pb.GenerateResponse] = channel.unary_stream(
                f"/isthmus.v1.Inference/{method}", bytes
            )
            for body in (INVALID_UTF8, CUT_OFF, NOISE):
                with pytest.raises(aio.AioRpcError, match="cannot be decoded") as caught:
                    await call(body).read()
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, (method, body)


async def test_grpc_refuses_ten_megabytes_by_its_own_limit(mesh: MeshProcess) -> None:
    async with aio.insecure_channel(mesh.grpc) as channel:  # which sends what it is given
        call = pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest(text="x" * (10 << 20)))
        with pytest.raises(aio.AioRpcError, match="larger than max") as caught:
            await call.read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
