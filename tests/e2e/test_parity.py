"""The whole mesh against transformers: the same greedy float32 tokens, and bytes that crossed."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest

from engine.checkpoint.locate import default_cache_dir, locate_model
from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.checkpoints import export_hf
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.prompts import prompt_lengths, text_of_length
from tests.e2e.reference import Reference

NUM_ANSWER_TOKENS = 64
# 30 layers x (key, value) x 3 heads x 64 x 4 bytes
DEMO_BYTES_PER_TOKEN_FLOAT32 = 46_080
# Room for sixteen of the longest at once: a preempted sequence would compute its end anew.
ENVIRONMENT = {"ISTHMUS_ENGINE__KV_POOL_BYTES": str(2 << 30)}
GREEDY = SamplingParams(temperature=0, max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def demo_path() -> Path:
    return locate_model("demo", cache_dir=default_cache_dir({}))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcess]:
    directory = tmp_path_factory.mktemp("mesh")
    with mesh_process(directory, "--dtype", "float32", environment=ENVIRONMENT) as running:
        yield running


@pytest.fixture(scope="module")
def reference(demo_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(export_hf(demo_path, tmp_path_factory.mktemp("hf")))


@pytest.fixture
async def stub(mesh: MeshProcess) -> AsyncIterator[pb_grpc.InferenceStub]:
    async with open_channel(mesh.grpc) as channel:
        yield pb_grpc.InferenceStub(channel)


async def complete(stub: pb_grpc.InferenceStub, prompt: Sequence[int]) -> list[int]:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=GREEDY)
    answer: list[int] = []
    async for response in stub.Generate(request):
        for delta in response.deltas:
            answer.extend(delta.token_ids)
        assert not response.report.degradations, response.report
    return answer


async def prompts(stub: pb_grpc.InferenceStub, lengths: Sequence[int]) -> list[list[int]]:
    """Different text for each prompt, so that hardly a prefix is shared."""
    found = []
    for index, length in enumerate(lengths):
        text = text_of_length(8 * length + 64, seed=index)
        response = await stub.Tokenize(pb.TokenizeRequest(text=text))
        found.append(list(response.token_ids[:length]))
        assert len(found[-1]) == length
    return found


@pytest.mark.timeout(1200)  # 53 prompts, twice, and as many passes of the judge
async def test_greedy_tokens_equal_transformers_alone_and_sixteen_at_once(
    stub: pb_grpc.InferenceStub, reference: Reference
) -> None:
    inputs = await prompts(stub, prompt_lengths())
    alone = [await complete(stub, prompt) for prompt in inputs]
    slots = asyncio.Semaphore(16)

    async def complete_among_others(prompt: Sequence[int]) -> list[int]:
        async with slots:
            return await complete(stub, prompt)

    together = await asyncio.gather(*map(complete_among_others, inputs))
    for prompt, answer, answer_among_others in zip(inputs, alone, together, strict=True):
        assert len(answer) == NUM_ANSWER_TOKENS
        assert reference.first_difference(prompt, answer) is None, f"{len(prompt)} tokens"
        assert answer_among_others == answer, f"{len(prompt)} tokens"


async def test_the_bytes_crossed_and_decode_computed_no_prompt_token(
    stub: pb_grpc.InferenceStub, mesh: MeshProcess
) -> None:
    before_bytes = mesh.metric("prefill", "isthmus_handover_bytes_total")
    before_prefilled = mesh.metric("prefill", "isthmus_engine_prefill_tokens_total")
    prompt = (await prompts(stub, [777]))[0]
    prompt.reverse()  # no prefix of it was ever seen
    await complete(stub, prompt)
    assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
    crossed = mesh.metric("prefill", "isthmus_handover_bytes_total") - before_bytes
    assert crossed == len(prompt) * DEMO_BYTES_PER_TOKEN_FLOAT32
    prefilled = mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") - before_prefilled
    assert prefilled == len(prompt)
