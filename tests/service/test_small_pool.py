"""A decode pool that is too small for what it took on: everybody is answered, and told."""

import asyncio
from pathlib import Path
from typing import Any

import httpx

from kv_transfer.config import TransferConfig
from tests.checkpoints import tiny_checkpoint
from tests.fakes.small_mesh import VOCAB_SIZE, SmallMesh, small_mesh

NUM_TOKENS = 150
PROMPTS = [[3 + (7 * start + index) % 250 for index in range(60)] for start in range(4)]
# 16 tokens x 3 layers x (key, value) x 2 heads x 16 x 4 bytes; an answer ends with 14 blocks.
POOL_BYTES = 40 * 12_288


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "isthmus": {"report": True},
    }
    answer = await client.post("/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def num_preempted(mesh: SmallMesh) -> float:
    return mesh.gateway.count(
        "isthmus_gateway_degradations_total", kind="preemption", reason="no_free_blocks"
    )


async def test_answers_that_gave_way_to_others_are_the_same_and_say_so(
    tmp_path: Path, redis_url: str
) -> None:
    checkpoint = tiny_checkpoint(tmp_path, vocab_size=VOCAB_SIZE)
    async with (
        small_mesh(checkpoint, TransferConfig(), redis_url, decode_pool_bytes=POOL_BYTES) as mesh,
        httpx.AsyncClient(base_url=mesh.gateway.http_url) as client,
    ):
        alone = [await ask(client, prompt) for prompt in PROMPTS]
        assert num_preempted(mesh) == mesh.decode.thread.stats.num_preemptions == 0
        together = await asyncio.gather(*(ask(client, prompt) for prompt in PROMPTS))
        said = [each for answer in together for each in answer["isthmus"]["degradations"]]
        assert [answer["choices"] for answer in together] == [answer["choices"] for answer in alone]
        assert not any(answer["isthmus"]["degradations"] for answer in alone)
        assert said == [{"kind": "preemption", "reason": "no_free_blocks"}] * len(said)
        assert len(said) == num_preempted(mesh) == mesh.decode.thread.stats.num_preemptions > 0
        assert mesh.decode.thread.stats.num_prefill_tokens > 0, "what was lost is computed again"
