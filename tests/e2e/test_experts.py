"""Mixtures of experts over groups of ranks, as `isthmus up` starts them, give the tokens of one."""

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.request import SamplingParams
from mesh.channel import open_channel
from mesh.convert import sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.e2e.mesh_process import mesh_process
from tests.e2e.one_engine import one_engine

LENGTHS = (1, 16, 33, 70, 150, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
NUM_CHOSEN = 2


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("mixture"),
        "qwen2_moe",
        num_experts=6,
        num_experts_per_tok=NUM_CHOSEN,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
    )


def prompts() -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


async def complete(stub: pb_grpc.InferenceStub, prompt: Sequence[int]) -> list[int]:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling_to_pb(GREEDY))
    token_ids: list[int] = []
    async for response in stub.Generate(request):
        for delta in response.deltas:
            token_ids += delta.token_ids
        assert not response.report.degradations, response.report
    return token_ids


@pytest.mark.parametrize(
    ("prefill", "decode", "num_decode"), [("ep=4", "tp=2,ep=2", 2), ("tp=2", "ep=2", 1)]
)
async def test_a_mesh_of_expert_groups_gives_the_tokens_of_one_rank(
    prefill: str, decode: str, num_decode: int, mixture: Path, tmp_path: Path
) -> None:
    """All prompts at once: data shards share them, and each hands over from and to its ranks."""
    flags = (
        *("--model", str(mixture), "--dtype", "float32", "--decode", str(num_decode)),
        *("--prefill-parallel", prefill, "--decode-parallel", decode),
    )
    with mesh_process(tmp_path, *flags) as mesh:
        async with open_channel(mesh.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            answers = await asyncio.gather(*(complete(stub, prompt) for prompt in prompts()))
        assert mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") == sum(LENGTHS)
    with one_engine(mixture, "float32") as engine:
        assert answers == [engine.answer(prompt, GREEDY).token_ids for prompt in prompts()]
