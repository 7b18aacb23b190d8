"""The gRPC door of a real mesh, and what every gRPC server of it says of itself."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    SamplingParams,
)
from tests.e2e.mesh_process import MeshProcess

MODEL = "SmolLM2-135M-Instruct.Q4_1"
PROMPT = "The capital of France is"
SERVICES = {
    "gateway": ["isthmus.v1.Inference"],
    "prefill": ["isthmus.v1.PrefillService"],
    "decode": ["isthmus.v1.DecodeService", "isthmus.v1.KvTransferService"],
}


@pytest.mark.parametrize("role", SERVICES)
async def test_every_server_has_reflection_and_health(demo_mesh: MeshProcess, role: str) -> None:
    address = demo_mesh.processes(role)[0]["addresses"]["grpc"]

    def look() -> None:
        with grpc.insecure_channel(address) as channel:
            reflected = ProtoReflectionDescriptorDatabase(channel)
            names = set(reflected.get_services())
            assert names >= {*SERVICES[role], "grpc.health.v1.Health"}
            pool = DescriptorPool(reflected)
            for name in SERVICES[role]:
                assert pool.FindServiceByName(name).methods, name
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", *SERVICES[role]):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING, name

    await asyncio.to_thread(look)


async def deltas(
    stub: pb_grpc.InferenceStub, *, text: str = PROMPT, echo: bool = False, **sampling: Any
) -> list[pb.Delta]:
    request = pb.GenerateRequest(
        text=text,
        echo=echo,
        sampling=SamplingParams(**{"temperature": 0, "max_tokens": 12, **sampling}),
    )
    return [d async for response in stub.Generate(request) for d in response.deltas]


def text_of(found: Sequence[pb.Delta], index: int = 0) -> str:
    return "".join(delta.text for delta in found if delta.index == index)


def ids_of(found: Sequence[pb.Delta], index: int = 0) -> list[int]:
    return [token for delta in found if delta.index == index for token in delta.token_ids]


async def test_models_and_tokens(demo_stub: pb_grpc.InferenceStub) -> None:
    models = (await demo_stub.ListModels(pb.ListModelsRequest())).models
    assert list(models) == [pb.Model(id=MODEL, max_context_tokens=8192)]
    text = "Grüße, 世界 \N{GRINNING FACE}!"
    ids = (await demo_stub.Tokenize(pb.TokenizeRequest(text=text))).token_ids
    assert (await demo_stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == text


async def test_chat_answers_and_reports(demo_stub: pb_grpc.InferenceStub) -> None:
    message = pb.ChatMessage(role="user", content="Name the capital of France in one sentence.")
    request = pb.ChatRequest(
        messages=[message], sampling=SamplingParams(temperature=0, max_tokens=40)
    )
    responses = [response async for response in demo_stub.Chat(request)]
    found = [delta for response in responses for delta in response.deltas]
    assert "Paris" in text_of(found)
    assert found[-1].finish_reason == FINISH_REASON_STOP
    last = responses[-1]
    assert last.usage.num_completion_tokens == len(ids_of(found))
    assert last.usage.num_prompt_tokens > 10
    assert last.report.prefill_worker_id.startswith("prefill-")
    assert last.report.decode_worker_id.startswith("decode-")
    assert 0 < last.report.time_to_first_token_ns < last.report.total_ns
    assert not last.report.degradations


async def test_several_answers_with_log_probabilities_from_the_first_token(
    demo_stub: pb_grpc.InferenceStub,
) -> None:
    found = await deltas(
        demo_stub, n=3, temperature=1.0, seed=5, num_top_logprobs=2, ignore_eos=True
    )
    for index in range(3):
        logprobs = [entry for d in found if d.index == index for entry in d.logprobs]
        assert len(logprobs) == len(ids_of(found, index)) == 12
        assert all(len(entry.top) == 2 and entry.logprob <= 0 for entry in logprobs)
    assert len({tuple(ids_of(found, index)) for index in range(3)}) == 3


async def test_stop_strings_and_echo(demo_stub: pb_grpc.InferenceStub) -> None:
    whole = text_of(await deltas(demo_stub))
    stop = whole[7:13]
    found = await deltas(demo_stub, stop=["never said", stop], echo=True)
    assert text_of(found) == PROMPT + whole[: whole.index(stop)]
    assert found[-1].finish_reason == FINISH_REASON_STOP


async def test_each_sampling_parameter_has_its_effect(demo_stub: pb_grpc.InferenceStub) -> None:
    """Each one alone changes a greedy or a seeded answer in the way that its name says."""
    greedy = ids_of(await deltas(demo_stub, ignore_eos=True))
    first = greedy[0]
    assert len(greedy) == 12

    async def ids(**sampling: Any) -> list[int]:
        return ids_of(await deltas(demo_stub, **{"ignore_eos": True, **sampling}))

    hot: Any = {"temperature": 2.0, "seed": 1}
    assert await ids(**hot) != greedy
    assert await ids(**hot, top_k=1) == greedy
    assert await ids(**hot, top_p=1e-6) == greedy
    assert await ids(**hot, min_p=1.0) == greedy
    assert await ids(**hot) == await ids(**hot)
    assert await ids(temperature=2.0, seed=2) != await ids(**hot)
    assert first not in await ids(logit_bias={first: -100})
    assert await ids(logit_bias={500: 100}) == [500] * 12
    # A bias that makes greedy decoding repeat one token for ever, and what ends that.
    again: Any = {"logit_bias": {500: 30}}
    assert set(await ids(**again)) == {500}
    assert set(await ids(**again, repetition_penalty=1e6)) != {500}
    # A choice of three: a penalty on what was drawn lets each of them come, a bonus does not.
    choice: Any = {"max_tokens": 24, "logit_bias": {500: 60, 501: 60, 502: 60}}
    drawn = {penalty: await ids(**choice, presence_penalty=penalty) for penalty in (-2, 2)}
    assert len(set(drawn[-2])) < len(set(drawn[2])) == 3
    even = Counter(await ids(**choice, frequency_penalty=2.0))
    assert sorted(even) == [500, 501, 502]
    assert max(even.values()) - min(even.values()) < 8
    uneven = Counter(await ids(**choice, frequency_penalty=-2.0))
    assert max(uneven.values()) > 20


async def test_what_ends_an_answer(demo_stub: pb_grpc.InferenceStub) -> None:
    greedy = await deltas(demo_stub, ignore_eos=True)
    third = ids_of(greedy)[2]
    assert greedy[-1].finish_reason == FINISH_REASON_LENGTH
    stopped = await deltas(demo_stub, stop_token_ids=[third])
    assert ids_of(stopped) == ids_of(greedy)[:3]
    assert stopped[-1].finish_reason == FINISH_REASON_STOP
    held_off = await deltas(demo_stub, stop_token_ids=[third], min_tokens=5)
    assert len(ids_of(held_off)) >= 5
    assert third not in ids_of(held_off)[:4]
    (one,) = ids_of(await deltas(demo_stub, max_tokens=1))
    assert one == ids_of(greedy)[0]
    end = 2  # <|im_end|>
    forced: Any = {"logit_bias": {end: 100.0}}
    assert ids_of(await deltas(demo_stub, **forced)) == [end]
    assert ids_of(await deltas(demo_stub, ignore_eos=True, **forced)) == [end] * 12
    assert len(ids_of(await deltas(demo_stub, min_tokens=4, **forced))) == 5
