"""Each bad input is answered at once with OpenAI's body and code, and the others go on."""

import asyncio
import json
import math

import grpc
import httpx
import openai
import pytest
from grpc import aio

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.inference_pb2_grpc import InferenceStub
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.fakes.gateway import MODEL_ID, gateway_over
from tests.fakes.workers import FakeDecodeWorker, FakePrefillWorker

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
PLAIN = {"prompt": "hi", "max_tokens": 2}

# (path, body, words of the message, param, code)
CHAT_PATH, PLAIN_PATH = "/v1/chat/completions", "/v1/completions"
BAD = {
    "empty prompt": (PLAIN_PATH, {"prompt": ""}, "must not be empty", "prompt", None),
    "no prompt": (PLAIN_PATH, {}, "must provide the parameter prompt", "prompt", None),
    "empty ids": (PLAIN_PATH, {"prompt": []}, "must not be empty", "prompt", None),
    "mixed prompt": (PLAIN_PATH, {"prompt": ["a", 1]}, "prompt must be", "prompt", None),
    "id too large": (PLAIN_PATH, {"prompt": [300]}, "token id 300", "prompt", None),
    "negative id": (PLAIN_PATH, {"prompt": [-1]}, "prompt[0]", "prompt[0]", None),
    "too many prompts": (PLAIN_PATH, {"prompt": ["a"] * 65}, "at most 64", "prompt", None),
    "long prompt": (
        PLAIN_PATH,
        {"prompt": "x" * 5000},
        "maximum context length is 4096",
        "prompt",
        "context_length_exceeded",
    ),
    "prompt beyond reason": (
        PLAIN_PATH,
        {"prompt": "x" * 2_000_000},
        "2000000 characters",
        "prompt",
        "context_length_exceeded",
    ),
    "prompt and answer": (
        PLAIN_PATH,
        {"prompt": "x" * 4000, "max_tokens": 97},
        "4097 tokens (4000 in the prompt",
        "max_tokens",
        "context_length_exceeded",
    ),
    "echo with logprobs": (
        PLAIN_PATH,
        {**PLAIN, "echo": True, "logprobs": 1},
        "echo",
        "echo",
        None,
    ),
    "suffix": (PLAIN_PATH, {**PLAIN, "suffix": "x"}, "suffix", "suffix", None),
    "best_of": (PLAIN_PATH, {**PLAIN, "best_of": 4}, "best_of", "best_of", None),
    "no messages": (CHAT_PATH, {"messages": []}, "messages must not be empty", "messages", None),
    "messages of a wrong type": (
        CHAT_PATH,
        {"messages": "hi"},
        "expected `array`",
        "messages",
        None,
    ),
    "unknown role": (
        CHAT_PATH,
        {"messages": [{"role": "wizard", "content": "x"}]},
        "messages[0].role is 'wizard'",
        "messages",
        None,
    ),
    "template raises": (
        CHAT_PATH,
        {"messages": [{"role": "tool", "content": "x"}]},
        "tools are not for me",
        "messages",
        None,
    ),
    "picture": (
        CHAT_PATH,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "text only",
        "messages[0].content",
        None,
    ),
    "null content": (
        CHAT_PATH,
        {"messages": [{"role": "user", "content": None}]},
        "must be a string",
        "messages[0].content",
        None,
    ),
    "tools": (
        CHAT_PATH,
        {**CHAT, "tools": [{}]},
        "tools is not supported by this model",
        "tools",
        None,
    ),
    "json mode": (
        CHAT_PATH,
        {**CHAT, "response_format": {"type": "json_object"}},
        "json_object",
        "response_format",
        None,
    ),
    "top_logprobs alone": (
        CHAT_PATH,
        {**CHAT, "top_logprobs": 2},
        "logprobs",
        "top_logprobs",
        None,
    ),
    "n = 0": (CHAT_PATH, {**CHAT, "n": 0}, "n: expected `int` >= 1", "n", None),
    "n too large": (CHAT_PATH, {**CHAT, "n": 17}, "n must be in [1, 16]", "n", None),
    "1000 stops": (CHAT_PATH, {**CHAT, "stop": ["x"] * 1000}, "at most 16 strings", "stop", None),
    "empty stop": (CHAT_PATH, {**CHAT, "stop": ""}, "stop string", "stop", None),
    "text temperature": (
        CHAT_PATH,
        {**CHAT, "temperature": "hot"},
        "temperature: expected `float | null`, got `str`",
        "temperature",
        None,
    ),
    "hot": (CHAT_PATH, {**CHAT, "temperature": 2.5}, "<= 2", "temperature", None),
    "top_p 0": (CHAT_PATH, {**CHAT, "top_p": 0}, "top_p must be in (0, 1]", "top_p", None),
    "max_tokens 0": (CHAT_PATH, {**CHAT, "max_tokens": 0}, ">= 1", "max_tokens", None),
    "max_tokens 2.5": (CHAT_PATH, {**CHAT, "max_tokens": 2.5}, "got `float`", "max_tokens", None),
    "bias of no token": (
        CHAT_PATH,
        {**CHAT, "logit_bias": {"a": 1}},
        "logit_bias",
        "logit_bias",
        None,
    ),
    "bias too strong": (
        CHAT_PATH,
        {**CHAT, "logit_bias": {"5": 101}},
        "[-100, 100]",
        "logit_bias",
        None,
    ),
    "unknown field": (
        CHAT_PATH,
        {**CHAT, "temprature": 1},
        "Unrecognized request argument supplied: temprature",
        "temprature",
        None,
    ),
    "stream_options alone": (
        CHAT_PATH,
        {**CHAT, "stream_options": {"include_usage": True}},
        "stream: true",
        "stream_options",
        None,
    ),
}


@pytest.fixture
async def mesh():
    async with (
        gateway_over(FakePrefillWorker("p0"), FakeDecodeWorker("d0")) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
    ):
        yield gateway, client


async def test_each_bad_body_is_answered_with_openais_error(mesh):
    gateway, client = mesh
    for name, (path, body, words, param, code) in BAD.items():
        answer = await client.post(path, json=body)
        assert answer.status_code == 400, name
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}, name
        assert words in error["message"], name
        assert (error["type"], error["param"], error["code"]) == (
            "invalid_request_error",
            param,
            code,
        ), name
    assert gateway.count("isthmus_gateway_requests_total", outcome="invalid") == len(BAD)
    assert (await client.post(CHAT_PATH, json=CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("body", "words", "param"),
    [
        (b"", "not valid JSON", None),
        (b"{", "not valid JSON", None),
        (b"[]", "must be a JSON object", None),
        (b'"hi"', "must be a JSON object", None),
        (b'{"prompt": "\xff\xfe"}', "not valid UTF-8", None),
        (b'{"prompt": "\\ud800"}', "not valid Unicode", None),
        (
            b'{"prompt": "a", "temperature": NaN}',
            "temperature must be a finite number",
            "temperature",
        ),
        (b'{"prompt": "a", "temperature": 1e999}', "temperature", "temperature"),
        (b'{"metadata": {"a": ' + b"[" * 100_000, "nested too deep", None),
    ],
)
async def test_what_is_not_json_is_said_so(mesh, body, words, param):
    answer = await mesh[1].post(PLAIN_PATH, content=body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]
    assert answer.json()["error"]["param"] == param


async def test_an_unknown_model_is_404(mesh):
    for path, body in ((CHAT_PATH, CHAT), (PLAIN_PATH, PLAIN)):
        answer = await mesh[1].post(path, json={**body, "model": "gpt-9"})
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
    assert (await mesh[1].get("/v1/models/gpt-9")).json()["error"]["code"] == "model_not_found"
    assert (await mesh[1].get(f"/v1/models/{MODEL_ID}")).json()["id"] == MODEL_ID


async def test_unknown_paths_and_methods_have_bodies_of_the_same_form(mesh):
    missing, wrong = await mesh[1].get("/v1/nothing"), await mesh[1].get(CHAT_PATH)
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert missing.json()["error"]["code"] == "unknown_url"
    assert wrong.json()["error"]["type"] == "invalid_request_error"


async def test_a_body_over_the_limit_is_413_declared_or_not(mesh):
    async def chunks():
        for _ in range(11):
            yield b"x" * (1 << 20)

    declared = await mesh[1].post(PLAIN_PATH, content=b"x" * (11 << 20))
    assert declared.status_code == 413
    undeclared = await mesh[1].post(PLAIN_PATH, content=chunks())
    assert undeclared.status_code == 413
    assert undeclared.json()["error"]["code"] == "request_too_large"


async def test_others_go_on_beside_a_ten_megabyte_body(mesh):
    body = json.dumps({"prompt": "x" * (9 << 20)}).encode()
    large, small = await asyncio.gather(
        mesh[1].post(PLAIN_PATH, content=body), mesh[1].post(PLAIN_PATH, json=PLAIN)
    )
    assert (large.status_code, small.status_code) == (400, 200)


async def test_no_worker_is_503_with_retry_after():
    async with gateway_over() as gateway, httpx.AsyncClient(base_url=gateway.http_url) as client:
        answer = await client.post(PLAIN_PATH, json=PLAIN)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert "no decode worker is registered" in answer.json()["error"]["message"]
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/live")).status_code == 200


async def test_too_many_requests_are_429_with_retry_after():
    decode = FakeDecodeWorker("d0")
    decode.tap.close()
    async with (
        gateway_over(decode, max_num_sequences=1) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
        asyncio.TaskGroup() as tasks,
    ):
        held = tasks.create_task(client.post(PLAIN_PATH, json=PLAIN))
        await decode.until(lambda: bool(decode.submitted))
        refused = await client.post(PLAIN_PATH, json=PLAIN)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert refused.headers["retry-after"] == "1"
        decode.tap.open()
        assert (await held).status_code == 200


async def test_a_model_without_chat_template_says_so():
    async with (
        gateway_over(FakeDecodeWorker("d0"), template=None) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
    ):
        answer = await client.post(CHAT_PATH, json=CHAT)
        assert answer.status_code == 400
        assert "no chat template" in answer.json()["error"]["message"]


async def test_openai_python_raises_its_own_errors(mesh):
    gateway, _ = mesh
    async with openai.AsyncOpenAI(base_url=f"{gateway.http_url}/v1", api_key="x") as client:
        with pytest.raises(openai.BadRequestError) as bad:
            await client.completions.create(model=MODEL_ID, prompt="x" * 5000)
        assert bad.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("request_", "code", "words"),
    [
        (pb.GenerateRequest(), "INVALID_ARGUMENT", "prompt must be set"),
        (pb.GenerateRequest(text=""), "INVALID_ARGUMENT", "must not be empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "INVALID_ARGUMENT", "must not be empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[999])), "INVALID_ARGUMENT", "999"),
        (pb.GenerateRequest(text="hi", model="x"), "NOT_FOUND", "does not exist"),
        (pb.GenerateRequest(text="x" * 5000), "INVALID_ARGUMENT", "maximum context length"),
        (
            pb.GenerateRequest(text="x", sampling=SamplingParams(temperature=math.nan)),
            "INVALID_ARGUMENT",
            "temperature",
        ),
        (
            pb.GenerateRequest(text="x", sampling=SamplingParams(stop=["x"] * 1000)),
            "INVALID_ARGUMENT",
            "at most 16",
        ),
        (
            pb.GenerateRequest(text="x", sampling=SamplingParams(n=4000)),
            "INVALID_ARGUMENT",
            "n must be",
        ),
    ],
)
async def test_grpc_names_what_to_change(mesh, request_, code, words):
    async with open_channel(mesh[0].grpc_address) as channel:
        with pytest.raises(aio.AioRpcError, match=words) as caught:
            async for _ in InferenceStub(channel).Generate(request_):
                pass
    assert caught.value.code() is grpc.StatusCode[code]


async def test_grpc_chat_refuses_roles_and_what_the_template_refuses(mesh):
    async with open_channel(mesh[0].grpc_address) as channel:
        for role, words in (("wizard", "wizard"), ("tool", "tools are not for me")):
            call = InferenceStub(channel).Chat(
                pb.ChatRequest(messages=[pb.ChatMessage(role=role, content="x")])
            )
            with pytest.raises(aio.AioRpcError, match=words) as caught:
                async for _ in call:
                    pass
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
