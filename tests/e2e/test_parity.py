"""The whole mesh against transformers: the same greedy float32 tokens, and bytes that crossed."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from engine.checkpoint.locate import locate_model
from tests.checkpoints import export_hf
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.prompts import prompt_lengths, text_of_length
from tests.e2e.reference import Reference

NUM_ANSWER_TOKENS = 64
# 30 layers x (key, value) x 3 heads x 64 x 4 bytes
DEMO_BYTES_PER_TOKEN_FLOAT32 = 46_080


@pytest.fixture(scope="module")
def demo_path() -> Path:
    return locate_model("demo")


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcess]:
    with mesh_process(tmp_path_factory.mktemp("mesh"), "--dtype", "float32") as running:
        yield running


@pytest.fixture(scope="module")
def reference(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(export_hf(demo_path, tmp_path_factory.mktemp("hf")))


@pytest.fixture
async def client(mesh: MeshProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=mesh.http, timeout=300) as http:
        yield http


async def complete(client: httpx.AsyncClient, prompt: list[int]) -> list[int]:
    response = await client.post(
        "/v1/completions",
        json={
            "prompt": prompt,
            "max_tokens": NUM_ANSWER_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        },
    )
    assert response.status_code == 200, response.text
    token_ids: list[int] = response.json()["choices"][0]["token_ids"]
    return token_ids


async def prompts(client: httpx.AsyncClient, lengths: list[int]) -> list[list[int]]:
    """Different text for each prompt, so that no prefix is shared."""
    found = []
    for index, length in enumerate(lengths):
        text = text_of_length(8 * length + 64, seed=index)
        response = await client.post("/v1/tokenize", json={"text": text})
        found.append(response.json()["token_ids"][:length])
        assert len(found[-1]) == length
    return found


async def test_greedy_tokens_equal_transformers_alone_and_sixteen_at_once(
    client: httpx.AsyncClient, reference: Reference
) -> None:
    inputs = await prompts(client, prompt_lengths())
    alone = [await complete(client, prompt) for prompt in inputs]
    slots = asyncio.Semaphore(16)

    async def complete_among_others(prompt: list[int]) -> list[int]:
        async with slots:
            return await complete(client, prompt)

    together = await asyncio.gather(*map(complete_among_others, inputs))
    for prompt, answer, answer_among_others in zip(inputs, alone, together, strict=True):
        assert len(answer) == NUM_ANSWER_TOKENS
        assert reference.first_difference(prompt, answer) is None, f"{len(prompt)} tokens"
        assert answer_among_others == answer, f"{len(prompt)} tokens"


async def test_the_bytes_crossed_and_decode_computed_no_prompt_token(
    client: httpx.AsyncClient, mesh: MeshProcess
) -> None:
    before_bytes = mesh.metric("prefill", "isthmus_handover_bytes_total")
    before_prefilled = mesh.metric("prefill", "isthmus_engine_prefill_tokens_total")
    prompt = (await prompts(client, [777]))[0]
    prompt.reverse()  # no prefix of it was ever seen
    await complete(client, prompt)
    assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
    crossed = mesh.metric("prefill", "isthmus_handover_bytes_total") - before_bytes
    assert crossed == len(prompt) * DEMO_BYTES_PER_TOKEN_FLOAT32
    prefilled = mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") - before_prefilled
    assert prefilled == len(prompt)
