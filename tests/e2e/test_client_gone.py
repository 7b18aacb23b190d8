"""A client goes away in each phase, through each door: both workers hold nothing afterwards."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.e2e.held import blocks_in_use, held, idle, until, until_idle
from tests.e2e.mesh_process import MeshProcess

LONG_PROMPT = 4000
"""Tokens; eight steps of prefill or more."""
MAX_TOKENS = 1000
STEPS = "isthmus_engine_steps_total"
DOORS = ("http stream", "http whole", "grpc")


def prompt_of(num_tokens: int, seed: int) -> list[int]:
    """Ids that no other test uses in this order, so that no prefix of them is cached."""
    generator = random.Random(f"client gone {seed}")
    return [generator.randrange(100, 40_000) for _ in range(num_tokens)]


class Client:
    """One request on its way; `leave` hangs up as a client that dies does."""

    def __init__(self, task: "asyncio.Task[None]") -> None:
        self.num_chunks = 0
        self._task = task

    async def leave(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled(), self._task.exception()


@asynccontextmanager
async def client_of(
    mesh: MeshProcess, door: str, prompt: Sequence[int], *, max_tokens: int = MAX_TOKENS
) -> AsyncIterator[Client]:
    """Ask through `door` and read what comes, inside the block."""
    ask = {"http stream": ask_http_stream, "http whole": ask_http_whole, "grpc": ask_grpc}[door]
    client: Client

    def on_chunk() -> None:
        client.num_chunks += 1

    task = asyncio.create_task(ask(mesh, prompt, max_tokens, on_chunk))
    client = Client(task)
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.wait([task])


async def ask_http_stream(
    mesh: MeshProcess, prompt: Sequence[int], max_tokens: int, on_chunk: Callable[[], None]
) -> None:
    body = http_body(prompt, max_tokens) | {"stream": True}
    async with (
        httpx.AsyncClient(base_url=mesh.http, timeout=120) as client,
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                on_chunk()


async def ask_http_whole(
    mesh: MeshProcess, prompt: Sequence[int], max_tokens: int, on_chunk: Callable[[], None]
) -> None:
    async with httpx.AsyncClient(base_url=mesh.http, timeout=120) as client:
        await client.post("/v1/completions", json=http_body(prompt, max_tokens))
        on_chunk()


async def ask_grpc(
    mesh: MeshProcess, prompt: Sequence[int], max_tokens: int, on_chunk: Callable[[], None]
) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt),
        sampling=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
    )
    async with open_channel(mesh.grpc) as channel:
        async for _ in pb_grpc.InferenceStub(channel).Generate(request):
            on_chunk()


def http_body(prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }


@pytest.fixture
async def mesh(demo_mesh: MeshProcess) -> MeshProcess:
    await until_idle(demo_mesh)
    return demo_mesh


@pytest.mark.parametrize("door", DOORS)
async def test_a_client_that_leaves_while_its_answer_is_decoded(
    mesh: MeshProcess, door: str
) -> None:
    before = mesh.metric("decode", STEPS)
    cancelled = mesh.metric("gateway", "isthmus_gateway_requests_total", outcome="cancelled")
    async with client_of(mesh, door, prompt_of(40, seed=DOORS.index(door))) as client:
        await until(
            lambda: (
                mesh.metric("decode", STEPS) >= before + 20
                and client.num_chunks >= (door != "http whole")
            ),
            lambda: held(mesh),
        )
        assert held(mesh) != idle(mesh)
        await client.leave()
        steps_at_leave = mesh.metric("decode", STEPS)
        await until_idle(mesh)
    # One step was under way, and the news takes some steps of a few milliseconds to arrive.
    steps = mesh.metric("decode", STEPS)
    assert steps - steps_at_leave <= 10
    assert steps - before < MAX_TOKENS / 2
    found = mesh.metric("gateway", "isthmus_gateway_requests_total", outcome="cancelled")
    assert found == cancelled + 1


@pytest.mark.parametrize("door", DOORS)
async def test_a_client_that_leaves_while_its_prompt_is_computed(
    mesh: MeshProcess, door: str
) -> None:
    before = mesh.metric("prefill", STEPS)
    decoded = mesh.metric("decode", STEPS)
    async with client_of(mesh, door, prompt_of(LONG_PROMPT, seed=10 + DOORS.index(door))) as client:
        await until(lambda: mesh.metric("prefill", STEPS) >= before + 2, lambda: held(mesh))
        assert blocks_in_use(mesh, "prefill") > 0
        assert blocks_in_use(mesh, "decode") == -(-LONG_PROMPT // 16)
        await client.leave()
        steps_at_leave = mesh.metric("prefill", STEPS)
        await until_idle(mesh)
    # The step under way ends; one more may have begun while the news was on its way.
    assert mesh.metric("prefill", STEPS) - steps_at_leave <= 2
    assert client.num_chunks == 0
    assert mesh.metric("decode", STEPS) == decoded


@pytest.mark.parametrize("door", DOORS)
async def test_a_client_that_leaves_the_queue_gives_its_place_up_and_the_other_is_answered(
    mesh: MeshProcess, door: str
) -> None:
    index = DOORS.index(door)
    async with client_of(
        mesh, "http whole", prompt_of(LONG_PROMPT, seed=20 + index), max_tokens=2
    ) as first:
        await until(lambda: blocks_in_use(mesh, "decode") > 0, lambda: held(mesh))
        alone = blocks_in_use(mesh, "decode")
        async with client_of(mesh, door, prompt_of(500, seed=30 + index)) as client:
            # Its blocks are reserved at once; the prefill worker's gauges follow at a step's end.
            await until(
                lambda: (
                    blocks_in_use(mesh, "decode") > alone
                    and mesh.metric("prefill", "isthmus_engine_waiting_sequences") == 1
                ),
                lambda: held(mesh),
            )
            steps_before = mesh.metric("prefill", STEPS)
            await client.leave()
            await until(
                lambda: (
                    blocks_in_use(mesh, "decode") == alone
                    and mesh.metric("prefill", "isthmus_engine_waiting_sequences") == 0
                ),
                lambda: held(mesh),
            )
            assert mesh.metric("prefill", STEPS) - steps_before <= 2
            assert first.num_chunks == 0, "the first was done before the second one left"
        await until(lambda: first.num_chunks == 1, lambda: held(mesh))
    await until_idle(mesh)
