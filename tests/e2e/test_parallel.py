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
    pytest.param(("--prefill", "0", "--decode-parallel", "tp=2"), id="decode-tp2"),
    pytest.param(("--prefill", "0", "--decode-parallel", "tp=3"), id="decode-tp3"),
    pytest.param(("--prefill", "0", "--decode-parallel", "pp=2"), id="decode-pp2"),
    pytest.param(
        ("--prefill-parallel", "tp=2", "--decode-parallel", "tp=3"), id="prefill-tp2-decode-tp3"
    ),
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
    return [
        token_id
        async for response in stub.Generate(request)
        for delta in response.deltas
        for token_id in delta.token_ids
    ]


@pytest.mark.parametrize("flags", LAYOUTS)
async def test_a_mesh_of_rank_groups_gives_the_tokens_of_one_rank(
    flags: tuple[str, ...], single: OneEngine, tmp_path: Path
) -> None:
    with mesh_process(tmp_path, "--dtype", "float32", *flags) as mesh:
        async with open_channel(mesh.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            for prompt in await prompts(stub):
                expected = single.answer(prompt, GREEDY).token_ids
                assert await complete(stub, prompt) == expected, f"{len(prompt)} tokens"
        ranks = mesh.processes("decode")[0]["rank_pids"]
        assert len(ranks) == int(flags[-1][-1])
        if "--prefill-parallel" in flags:
            assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
            assert mesh.metric("decode", "isthmus_handover_received_tokens_total") == sum(LENGTHS)
        assert mesh.metric("decode", "isthmus_rank_steps_total", rank="1") > 0
        assert mesh.metric("decode", "isthmus_rank_communication_seconds_total", rank="0") > 0
        share = mesh.metric("decode", "isthmus_pipeline_bubble_share")
        assert (0.1 < share < 0.9) if "pp=2" in flags else share == 0
