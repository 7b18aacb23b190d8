import asyncio
import json

import httpx
import openai
import pytest

from tests.fakes.gateway import MODEL_ID, RunningGateway, gateway_over
from tests.fakes.workers import (
    END_TOKEN_ID,
    FakeDecodeWorker,
    FakePrefillWorker,
    next_token,
    spelling,
)


def expected(prompt: str, num_tokens: int, seed: int = 0) -> str:
    return bytes(next_token(prompt.encode(), k, seed) for k in range(num_tokens)).decode()


def client_of(gateway: RunningGateway) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{gateway.http_url}/v1", api_key="none", max_retries=0)


def workers(**fields):
    return FakePrefillWorker("p0", **fields), FakeDecodeWorker("d0", **fields)


async def test_a_completion_is_prefill_tokens_then_decode_tokens():
    async with gateway_over(*workers()) as gateway, client_of(gateway) as client:
        answer = await client.completions.create(
            model=MODEL_ID, prompt="Hello", max_tokens=8, seed=5
        )
    assert answer.choices[0].text == expected("Hello", 8, 5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 8)


async def test_a_streamed_chat_ends_with_its_finish_reason_and_usage():
    text = "Grüße, 世界 😀!"
    async with (
        gateway_over(*workers(next_token=spelling(text.encode(), END_TOKEN_ID))) as gateway,
        client_of(gateway) as client,
    ):
        stream = await client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "Hi"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(text.encode()) + 1


async def test_no_handover_is_lost_and_nothing_is_held_afterwards():
    prefill, decode = workers()
    async with gateway_over(prefill, decode) as gateway, client_of(gateway) as client:
        prompts = [f"prompt {k}" for k in range(12)]
        answers = await asyncio.gather(
            *(
                client.completions.create(model=MODEL_ID, prompt=p, max_tokens=9, seed=1)
                for p in prompts
            )
        )
        await gateway.aborts_acknowledged()
        assert [a.choices[0].text for a in answers] == [expected(p, 9, 1) for p in prompts]
        assert not decode.open_sequences
        assert not decode.reserved
        assert not prefill.open_sequences
        assert decode.num_prefill_tokens == 0
        books = [w.book for w in gateway.service.pools.decode.values()]
        books += [w.book for w in gateway.service.pools.prefill.values()]
        assert [(b.num_sequences, b.num_tokens) for b in books] == [(0, 0), (0, 0)]


async def test_the_report_comes_when_asked_for():
    async with gateway_over(*workers()) as gateway, httpx.AsyncClient() as client:
        url = f"{gateway.http_url}/v1/completions"
        plain = await client.post(url, json={"prompt": "Hello", "max_tokens": 3})
        asked = await client.post(
            url, json={"prompt": "Hello", "max_tokens": 3, "isthmus": {"report": True}}
        )
        streamed = await client.post(
            url,
            json={"prompt": "Hello", "max_tokens": 3, "stream": True},
            headers={"x-isthmus-report": "1"},
        )
    assert "isthmus" not in plain.json()
    report = asked.json()["isthmus"]
    assert report["handover_bytes"] == 500
    assert (report["prefill_worker_id"], report["decode_worker_id"]) == ("p0", "d0")
    assert report["prefill_ns"] == 4000
    assert report["first_decode_step_ns"] == 2000
    assert 0 < report["time_to_first_token_ns"] <= report["total_ns"]
    assert report["degradations"] == []
    events = [line[6:] for line in streamed.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["isthmus"]["handover_bytes"] == 500


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_a_stop_string_cuts_the_answer_and_frees_the_workers(is_streamed):
    prefill, decode = workers(next_token=spelling(b"one two three four "))
    async with gateway_over(prefill, decode) as gateway, client_of(gateway) as client:
        answer = await client.completions.create(
            model=MODEL_ID, prompt="x", max_tokens=1000, stop=["three", "zzz"], stream=is_streamed
        )
        if is_streamed:
            chunks = [chunk async for chunk in answer]
            text = "".join(chunk.choices[0].text for chunk in chunks)
            finish = chunks[-1].choices[0].finish_reason
        else:
            text, finish = answer.choices[0].text, answer.choices[0].finish_reason
        await gateway.aborts_acknowledged()
        assert (text, finish) == ("one two ", "stop")
        assert not decode.open_sequences
        assert decode.aborted == [decode.submitted[0].request_id]
