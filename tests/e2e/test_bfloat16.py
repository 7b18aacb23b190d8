"""In bfloat16 prefill and decode as two processes give what one engine gives that does both."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest

from engine.checkpoint.locate import default_cache_dir, locate_model
from engine.request import SamplingParams, TokenLogprobs
from mesh.convert import logprobs_from_pb, logprobs_to_pb, sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.one_engine import EngineAnswer, OneEngine, one_engine
from tests.e2e.prompts import text_of_length

# Around the borders of blocks (16) and of chunks (256 while cores are shared, else 512).
LENGTHS = (
    *(1, 2, 15, 16, 17, 31, 32, 33, 100, 255, 256, 257),
    *(511, 512, 513, 767, 768, 769, 1023, 1024, 1025, 1537),
)
NUM_ANSWER_TOKENS = 24
GREEDY = SamplingParams(
    max_tokens=NUM_ANSWER_TOKENS, ignore_eos=True, num_top_logprobs=3, seed=11, temperature=0
)
SAMPLED = replace(GREEDY, temperature=0.75, top_p=0.9375, min_p=0.0078125, repetition_penalty=1.125)
"""Numbers that float32 holds exactly: they cross the wire as such."""


@pytest.fixture(scope="module")
def single() -> Iterator[OneEngine]:
    model = locate_model("demo", cache_dir=default_cache_dir({}))
    with one_engine(model, "bfloat16") as engine:
        yield engine


async def prompts(stub: pb_grpc.InferenceStub) -> list[list[int]]:
    found = []
    for index, length in enumerate(LENGTHS):
        text = text_of_length(8 * length + 64, seed=1000 + index)
        response = await stub.Tokenize(pb.TokenizeRequest(text=text))
        found.append(list(response.token_ids[:length]))
        assert len(found[-1]) == length
    return found


async def mesh_answer(
    stub: pb_grpc.InferenceStub, prompt: Sequence[int], sampling: SamplingParams
) -> EngineAnswer:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=sampling_to_pb(sampling)
    )
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    async for response in stub.Generate(request):
        for delta in response.deltas:
            token_ids += delta.token_ids
            logprobs += map(logprobs_from_pb, delta.logprobs)
        assert not response.report.degradations, response.report
    assert response.report.handover_bytes or response.usage.num_cached_tokens
    return EngineAnswer(token_ids, logprobs)


def assert_equal(answer: EngineAnswer, expected: EngineAnswer, what: str) -> None:
    assert len(answer.token_ids) == len(answer.logprobs) == NUM_ANSWER_TOKENS
    assert answer.token_ids == expected.token_ids, what
    assert answer.logprobs == list(map(as_on_the_wire, expected.logprobs)), what


def as_on_the_wire(logprobs: TokenLogprobs) -> TokenLogprobs:
    """Rounded to float32."""
    return logprobs_from_pb(logprobs_to_pb(logprobs))


async def test_greedy_answers_equal_those_of_one_engine(
    demo_stub: pb_grpc.InferenceStub, single: OneEngine
) -> None:
    for prompt in await prompts(demo_stub):
        answer = await mesh_answer(demo_stub, prompt, GREEDY)
        assert_equal(answer, single.answer(prompt, GREEDY), f"{len(prompt)}")


async def test_sampled_answers_of_many_at_once_equal_those_of_one_engine(
    demo_stub: pb_grpc.InferenceStub, single: OneEngine
) -> None:
    """Their prompts are other ones, so that no prefix is in the cache."""
    inputs = [list(reversed(prompt)) for prompt in await prompts(demo_stub)]
    answers = await asyncio.gather(*(mesh_answer(demo_stub, prompt, SAMPLED) for prompt in inputs))
    for prompt, answer in zip(inputs, answers, strict=True):
        assert_equal(answer, single.answer(prompt, SAMPLED), f"{len(prompt)}")
