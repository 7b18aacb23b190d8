"""Workers of several ranks, as `isthmus up` starts them, give the tokens of one rank."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from engine.checkpoint.locate import default_cache_dir, locate_model
from engine.request import SamplingParams
from mesh.channel import open_channel
from mesh.convert import sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.mesh_process import mesh_process
from tests.e2e.one_engine import OneEngine, one_engine
from tests.e2e.prompts import text_of_length

LENGTHS = (1, 33, 300)
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
LAYOUTS = [
    pytest.param(prefill, decode, id=f"{prefill}-to-{decode}")
    for prefill, decode in (("tp=2", "tp=3"), ("tp=3", "tp=2"), ("pp=2", "pp=2"))
]


@pytest.fixture(scope="module")
def single() -> Iterator[OneEngine]:
    model = locate_model("demo", cache_dir=default_cache_dir({}))
    with one_engine(model, "float32") as engine:
        yield engine


async def prompts(stub: pb_grpc.InferenceStub) -> list[list[int]]:
    found = []
    for index, length in enumerate(LENGTHS):
        text = text_of_length(8 * length + 64, seed=300 + index)
        response = await stub.Tokenize(pb.TokenizeRequest(text=text))
        found.append(list(response.token_ids[:length]))
    return found


async def complete(stub: pb_grpc.InferenceStub, prompt: Sequence[int]) -> list[int]:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling_to_pb(GREEDY))
    token_ids: list[int] = []
    async for response in stub.Generate(request):
        for delta in response.deltas:
            token_ids += delta.token_ids
        assert not response.report.degradations, response.report
    return token_ids


@pytest.mark.parametrize(("prefill", "decode"), LAYOUTS)
async def test_a_mesh_of_rank_groups_gives_the_tokens_of_one_rank(
    prefill: str, decode: str, single: OneEngine, tmp_path: Path
) -> None:
    flags = ("--dtype", "float32", "--prefill-parallel", prefill, "--decode-parallel", decode)
    with mesh_process(tmp_path, *flags) as mesh:
        async with open_channel(mesh.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            for prompt in await prompts(stub):
                expected = single.answer(prompt, GREEDY).token_ids
                assert await complete(stub, prompt) == expected, f"{len(prompt)} tokens"
        assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
        assert mesh.metric("decode", "isthmus_handover_received_tokens_total") == sum(LENGTHS)
        for role, layout in (("prefill", prefill), ("decode", decode)):
            assert len(mesh.processes(role)[0]["rank_pids"]) == int(layout[-1])
            assert mesh.metric(role, "isthmus_rank_steps_total", rank="1") > 0
            assert mesh.metric(role, "isthmus_rank_communication_seconds_total", rank="0") > 0
            share = mesh.metric(role, "isthmus_pipeline_bubble_share")
            assert (0.1 < share < 0.9) if layout == "pp=2" else share == 0
