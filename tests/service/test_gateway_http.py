import asyncio
import json

import httpx
import openai
import pytest

from gateway.http.forms import CompletionForm
from gateway.session import RecoveryConfig
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


async def test_a_client_that_hangs_up_frees_both_workers():
    prefill, decode = workers()
    decode.tap.close()
    async with gateway_over(prefill, decode) as gateway:
        async with (
            httpx.AsyncClient(base_url=gateway.http_url) as client,
            client.stream(
                "POST",
                "/v1/completions",
                json={"prompt": "Hello", "max_tokens": 500, "stream": True},
            ) as answer,
        ):
            async for _ in answer.aiter_lines():
                break
            await decode.until(lambda: bool(decode.open_sequences))
        await decode.until(lambda: not decode.open_sequences and bool(decode.aborted))
        await gateway.aborts_acknowledged()
        assert decode.aborted == [decode.submitted[0].request_id]
        assert not decode.reserved
        assert gateway.service.admission.num_sequences == 0
        assert gateway.count("isthmus_gateway_requests_total", outcome="cancelled") == 1


async def test_a_client_that_hangs_up_before_any_token_frees_both_workers():
    prefill, decode = workers()
    prefill.tap.close()
    async with gateway_over(prefill, decode) as gateway:
        async with httpx.AsyncClient(base_url=gateway.http_url) as client:
            asking = asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "Hello"}))
            await prefill.until(lambda: bool(prefill.open_sequences))
            asking.cancel()
        await prefill.until(lambda: not prefill.open_sequences)
        await decode.until(lambda: not decode.open_sequences)
        assert gateway.count("isthmus_gateway_requests_total", outcome="cancelled") == 1


async def test_several_prompts_and_answers_are_numbered_prompt_by_prompt():
    async with gateway_over(*workers()) as gateway, client_of(gateway) as client:
        answer = await client.completions.create(
            model=MODEL_ID, prompt=["ab", "cd"], n=2, max_tokens=3, seed=7, echo=True
        )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [choice.text for choice in answer.choices]
    assert [text[:2] for text in texts] == ["ab", "ab", "cd", "cd"]
    assert [texts[0], texts[2]] == ["ab" + expected("ab", 3, 7), "cd" + expected("cd", 3, 7)]
    assert texts[0] != texts[1]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 12)


async def test_token_ids_are_a_prompt_and_the_default_is_16_tokens():
    async with gateway_over(*workers()) as gateway, client_of(gateway) as client:
        answer = await client.completions.create(model=MODEL_ID, prompt=[72, 105], seed=1)
    assert answer.choices[0].text == expected("Hi", 16, 1)


async def test_logprobs_of_completions_begin_with_the_first_token():
    async with gateway_over(*workers()) as gateway, client_of(gateway) as client:
        answer = await client.completions.create(
            model=MODEL_ID, prompt="Hi", max_tokens=3, logprobs=2, seed=1
        )
    found, text = answer.choices[0].logprobs, expected("Hi", 3, 1)
    assert found is not None
    assert found.tokens == list(text)
    assert found.token_logprobs == [-0.5] * 3
    assert found.text_offset == [0, 1, 2]
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] == {text[0]: -0.5, chr(ord(text[0]) + 1): -1.5}


@pytest.mark.parametrize("is_streamed", [False, True])
async def test_logprobs_of_chats_leave_the_end_token_out(is_streamed):
    fields = workers(next_token=spelling("é".encode(), END_TOKEN_ID))
    async with gateway_over(*fields) as gateway, client_of(gateway) as client:
        answer = await client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": "x"}],
            logprobs=True,
            top_logprobs=1,
            stream=is_streamed,
        )
        if is_streamed:
            chunks = [chunk.choices[0] async for chunk in answer]
            content = [entry for c in chunks if c.logprobs for entry in c.logprobs.content]
            text = "".join(c.delta.content or "" for c in chunks)
        else:
            content = answer.choices[0].logprobs.content
            text = answer.choices[0].message.content
    assert text == "é"
    assert [entry.bytes for entry in content] == [[0xC3], [0xA9]]
    assert [len(entry.top_logprobs) for entry in content] == [1, 1]


async def test_sampling_reaches_the_workers_as_asked():
    prefill, decode = workers()
    async with gateway_over(prefill, decode) as gateway, client_of(gateway) as client:
        await client.chat.completions.create(
            model=MODEL_ID,
            messages=[{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            temperature=0.5,
            top_p=0.75,
            presence_penalty=1,
            frequency_penalty=-1,
            logit_bias={"5": 2},
            seed=-1,
            max_completion_tokens=4,
            extra_body={
                "top_k": 3,
                "min_p": 0.25,
                "repetition_penalty": 1.5,
                "ignore_eos": True,
                "min_tokens": 2,
                "stop_token_ids": [9],
            },
        )
    sampling = decode.submitted[0].sampling
    assert sampling == prefill.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.75, 3)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.25, 1.5)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert dict(sampling.logit_bias) == {5: 2}
    assert (sampling.seed, sampling.max_tokens, sampling.min_tokens) == (2**64 - 1, 4, 2)
    assert (sampling.ignore_eos, list(sampling.stop_token_ids)) == (True, [9])
    assert bytes(decode.submitted[0].prompt_token_ids) == b"[user]x[assistant]"


async def test_the_other_pages_answer():
    async with (
        gateway_over(*workers()) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
        client_of(gateway) as openai_client,
    ):
        assert [model.id async for model in openai_client.models.list()] == [MODEL_ID]
        status = (await client.get("/status")).json()
        assert [(w["worker_id"], w["role"]) for w in status["workers"]] == [
            ("p0", "prefill"),
            ("d0", "decode"),
        ]
        assert (await client.get("/health")).status_code == 200
        assert "<html" in (await client.get("/")).text
        await client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "me"})
        metrics = (await client.get("/metrics")).text
        assert 'isthmus_gateway_requests_total{outcome="ok"} 1.0' in metrics
        assert "isthmus_time_to_first_token_seconds_count 1.0" in metrics
        assert "isthmus_inter_token_latency_seconds_count 15.0" in metrics


async def test_the_request_id_is_in_the_header_and_in_the_workers():
    prefill, decode = workers()
    async with (
        gateway_over(prefill, decode) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
    ):
        answer = await client.post(
            "/v1/completions", json={"prompt": "a"}, headers={"x-request-id": "mine"}
        )
        request_id = answer.headers["x-request-id"]
        assert request_id.startswith("mine-")
        assert answer.json()["id"] == f"cmpl-{request_id}"
        assert decode.submitted[0].request_id.startswith(request_id)


async def test_an_error_in_mid_stream_is_the_last_event():
    prefill, decode = workers()
    decode.tap.close()
    recovery = RecoveryConfig(wait_for_worker_s=0.02, retry_delay_s=0.001)
    async with (
        gateway_over(prefill, decode, recovery=recovery) as gateway,
        httpx.AsyncClient(base_url=gateway.http_url) as client,
        client.stream(
            "POST",
            "/v1/completions",
            json={"prompt": "Hello", "max_tokens": 5, "stream": True, "seed": 0},
        ) as answer,
    ):
        lines = answer.aiter_lines()
        assert json.loads((await anext(lines))[6:])["choices"][0]["text"] == expected("Hello", 1)
        await decode.die()
        rest = [line async for line in lines if line]
        assert json.loads(rest[-1][6:])["error"]["code"] == "service_unavailable"


async def test_a_bug_is_an_internal_error_without_detail(monkeypatch, caplog):
    monkeypatch.setattr(CompletionForm, "whole", fail_with_a_bug)
    async with gateway_over(*workers()) as gateway, httpx.AsyncClient() as client:
        url = f"{gateway.http_url}/v1/completions"
        answer = await client.post(url, json={"prompt": "Hi", "max_tokens": 3})
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text
    assert any(record.exc_info for record in caplog.records)


async def test_a_bug_after_the_first_token_is_the_last_event(monkeypatch, caplog):
    monkeypatch.setattr(CompletionForm, "closing", fail_with_a_bug)
    prefill, decode = workers()
    decode.tap.close()
    async with gateway_over(prefill, decode) as gateway, httpx.AsyncClient() as client:
        url = f"{gateway.http_url}/v1/completions"
        body = {"prompt": "Hi", "max_tokens": 3, "stream": True}
        async with client.stream("POST", url, json=body) as answer:
            decode.tap.open()
            events = (await answer.aread()).split(b"\n\n")
    assert answer.status_code == 200
    assert json.loads(events[-2].removeprefix(b"data: "))["error"]["code"] == "internal_error"
    assert b"[DONE]" not in b"".join(events)
    assert any(record.exc_info for record in caplog.records)


def fail_with_a_bug(*_: object) -> bytes:
    raise KeyError("secret")
