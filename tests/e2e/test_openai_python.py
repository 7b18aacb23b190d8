"""OpenAI's own Python client against a real mesh: every call that the mesh answers."""

import math
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.e2e.mesh_process import MeshProcess

MODEL = "SmolLM2-135M-Instruct.Q4_1"
QUESTION: Any = [{"role": "user", "content": "Name the capital of France in one sentence."}]
PROMPT = "The capital of France is"


@pytest.fixture
async def client(demo_mesh: MeshProcess) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{demo_mesh.http}/v1", api_key="none", max_retries=0
    ) as opened:
        yield opened


async def test_models(client: openai.AsyncOpenAI) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [MODEL]
    assert (await client.models.retrieve(MODEL)).owned_by == "isthmus"


async def test_chat_whole_and_streamed_are_the_same_answer(client: openai.AsyncOpenAI) -> None:
    whole = await client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_completion_tokens=40
    )
    (choice,) = whole.choices
    assert "Paris" in (choice.message.content or "")
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    usage = whole.usage
    assert usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_completion_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    *rest, last = chunks
    text = "".join(choice.delta.content or "" for chunk in rest for choice in chunk.choices)
    assert text == choice.message.content
    assert rest[0].choices[0].delta.role == "assistant"
    assert [c.finish_reason for chunk in rest for c in chunk.choices if c.finish_reason] == ["stop"]
    assert len(rest) > 5, "it came as it was decoded"
    assert all(chunk.usage is None for chunk in rest)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == usage.completion_tokens
    assert last.usage.prompt_tokens == usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


async def test_completion_whole_and_streamed_are_the_same_answer(
    client: openai.AsyncOpenAI,
) -> None:
    whole = await client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12
    )
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = await client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=12, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks), "nobody asked for it"


async def test_several_answers_differ_and_a_seed_repeats_them(client: openai.AsyncOpenAI) -> None:
    async def texts(seed: int | None) -> list[str]:
        answer = await client.completions.create(
            model=MODEL, prompt="Once upon a time", n=4, seed=seed, max_tokens=12, temperature=1.0
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= 48
        return [choice.text for choice in answer.choices]

    first = await texts(seed=7)
    assert len(set(first)) == 4
    assert await texts(seed=7) == first
    assert await texts(seed=8) != first
    assert await texts(seed=None) != await texts(seed=None)


async def test_several_answers_are_streamed_side_by_side(client: openai.AsyncOpenAI) -> None:
    request: Any = {"model": MODEL, "prompt": ["One", "Two"], "n": 2, "seed": 3, "max_tokens": 10}
    whole = await client.completions.create(**request)
    pieces = dict.fromkeys(range(4), "")
    finished = set()
    async for chunk in await client.completions.create(**request, stream=True):
        for choice in chunk.choices:
            assert choice.index not in finished
            pieces[choice.index] += choice.text
            if choice.finish_reason:
                finished.add(choice.index)
    assert finished == {0, 1, 2, 3}
    assert list(pieces.values()) == [choice.text for choice in whole.choices]


async def test_a_stop_string_that_crosses_tokens_cuts_the_answer(
    client: openai.AsyncOpenAI,
) -> None:
    """Every stretch of the answer is taken as a stop string once, wherever tokens begin in it."""
    request: Any = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 16}
    whole = (await client.completions.create(**request)).choices[0].text
    for start in range(1, 20):
        stop = whole[start : start + 6]
        cut = whole[: whole.index(stop)]
        answer = await client.completions.create(**request, stop=[stop])
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (cut, "stop"), stop
        stream = await client.completions.create(**request, stop=["never said", stop], stream=True)
        choices = [chunk.choices[0] async for chunk in stream]
        assert "".join(choice.text for choice in choices) == cut, stop
        assert choices[-1].finish_reason == "stop", stop


async def test_log_probabilities_begin_with_the_first_token(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0,
        max_completion_tokens=6,
        logprobs=True,
        top_logprobs=3,
    )
    (choice,) = answer.choices
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    assert len(content) == 6
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == (
        choice.message.content
    )
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the likeliest"
        assert 0 < sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-5
    plain = await client.completions.create(
        model=MODEL, prompt=PROMPT, temperature=0, max_tokens=4, logprobs=2
    )
    found = plain.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == plain.choices[0].text
    assert [len(top) for top in found.top_logprobs or []] == [2] * 4


async def test_errors_are_the_clients_own(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="gpt-9", messages=QUESTION)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("gpt-9")
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=MODEL, prompt=[5] * 8193)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as hot:
        await client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=3)
    assert hot.value.param == "temperature"
    strange: Any = [{"role": "wizard", "content": "x"}]
    with pytest.raises(openai.BadRequestError):
        await client.chat.completions.create(model=MODEL, messages=strange)
    with pytest.raises(openai.BadRequestError):  # a stream that never begins is no stream
        await client.completions.create(model=MODEL, prompt="", stream=True)
