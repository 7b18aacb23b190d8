"""Mixtures of experts over groups of ranks, as `isthmus up` starts them, give the tokens of one."""

import asyncio
import random
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from engine.checkpoint.digest import model_digest
from engine.checkpoint.read import read_config
from engine.request import SamplingParams
from engine.runtime.expert_counts import read_counts
from mesh.channel import open_channel
from mesh.convert import sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.one_engine import one_engine

LENGTHS = (1, 16, 33, 70, 150, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
NUM_EXPERTS, NUM_CHOSEN, NUM_LAYERS = 6, 2, 3


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("mixture"),
        "qwen2_moe",
        num_experts=NUM_EXPERTS,
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


def check_expert_metrics(mesh: MeshProcess) -> None:
    """Every prompt token visits its experts once in each layer; other ranks report each second."""
    expected = NUM_CHOSEN * sum(LENGTHS)
    for layer in map(str, range(NUM_LAYERS)):
        end_s = time.monotonic() + 30
        while mesh.metric("prefill", "isthmus_expert_tokens_total", layer=layer) != expected:
            assert time.monotonic() < end_s, "counts did not come"
            time.sleep(0.05)
        counts = [
            mesh.metric("prefill", "isthmus_expert_tokens_total", layer=layer, expert=str(expert))
            for expert in range(NUM_EXPERTS)
        ]
        imbalance = mesh.metric("prefill", "isthmus_expert_imbalance", layer=layer)
        assert imbalance == pytest.approx(max(counts) / (expected / NUM_EXPERTS))
    of_ranks = mesh.metric("prefill", "isthmus_expert_rank_tokens_total")
    assert of_ranks == expected * NUM_LAYERS


@pytest.mark.parametrize(
    ("prefill", "decode", "num_decode"), [("ep=4", "tp=2,ep=2", 2), ("sp=2,ep=2", "ep=2", 1)]
)
async def test_a_mesh_of_expert_groups_gives_the_tokens_of_one_rank(
    prefill: str, decode: str, num_decode: int, mixture: Path, tmp_path: Path
) -> None:
    """All prompts at once: data shards share them, and each hands over from and to its ranks."""
    counts = tmp_path / "experts.json"
    environment = {"ISTHMUS_ENGINE__EXPERT_COUNTS": str(counts)}
    flags = (
        *("--model", str(mixture), "--dtype", "float32", "--decode", str(num_decode)),
        *("--prefill-parallel", prefill, "--decode-parallel", decode),
    )
    with mesh_process(tmp_path, *flags, environment=environment) as mesh:
        async with open_channel(mesh.grpc) as channel:
            stub = pb_grpc.InferenceStub(channel)
            answers = await asyncio.gather(*(complete(stub, prompt) for prompt in prompts()))
        assert mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") == sum(LENGTHS)
        check_expert_metrics(mesh)
    experts = read_config(mixture).form.experts
    assert experts is not None
    kept = read_counts(counts, digest=model_digest(mixture), experts=experts)
    assert all(sum(tokens) > 0 for tokens in kept.values()), "counted by the worker that ended last"
    with one_engine(mixture, "float32") as engine:
        assert answers == [engine.answer(prompt, GREEDY).token_ids for prompt in prompts()]
