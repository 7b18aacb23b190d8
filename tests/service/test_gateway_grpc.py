import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.inference_pb2_grpc import InferenceStub
from protos.isthmus.v1.sampling_pb2 import FINISH_REASON_STOP, SamplingParams
from tests.fakes.gateway import MODEL_ID, gateway_over
from tests.fakes.workers import END_TOKEN_ID, FakeDecodeWorker, FakePrefillWorker, spelling

TEXT = "Grüße, 世界!"


@pytest.fixture
async def mesh():
    answer = spelling(TEXT.encode(), END_TOKEN_ID)
    workers = FakePrefillWorker("p0", answer), FakeDecodeWorker("d0", answer)
    async with gateway_over(*workers) as gateway, open_channel(gateway.grpc_address) as channel:
        yield *workers, channel


async def test_chat_streams_whole_characters_and_ends_with_usage_and_report(mesh):
    _, decode, channel = mesh
    responses = [
        response
        async for response in InferenceStub(channel).Chat(
            pb.ChatRequest(
                messages=[pb.ChatMessage(role="user", content="hi", name="Ann")],
                sampling=SamplingParams(num_top_logprobs=1),
            )
        )
    ]
    deltas = [delta for response in responses for delta in response.deltas]
    assert "".join(delta.text for delta in deltas) == TEXT
    assert [token for delta in deltas for token in delta.token_ids] == [
        *TEXT.encode(),
        END_TOKEN_ID,
    ]
    assert all(len(delta.logprobs) == len(delta.token_ids) for delta in deltas)
    assert deltas[-1].finish_reason == FINISH_REASON_STOP
    assert {response.request_id for response in responses} == {responses[0].request_id}
    assert not any(response.HasField("usage") for response in responses[:-1])
    prompt = bytes(decode.submitted[0].prompt_token_ids)
    assert prompt == b"[user]hi[assistant]"
    num_bytes = len(TEXT.encode())
    assert responses[-1].usage == pb.Usage(
        num_prompt_tokens=len(prompt), num_completion_tokens=num_bytes + 1
    )
    report = responses[-1].report
    assert (report.handover_bytes, report.data_plane) == (100 * len(prompt), "tcp")
    assert not responses[0].HasField("report")


async def test_echo_comes_before_the_answer_and_stop_strings_cut_it(mesh):
    _, _, channel = mesh
    call = InferenceStub(channel).Generate(
        pb.GenerateRequest(
            text="Say: ", echo=True, model=MODEL_ID, sampling=SamplingParams(stop=["世"])
        )
    )
    text = "".join([delta.text async for response in call for delta in response.deltas])
    assert text == "Say: Grüße, "


async def test_tokenize_and_detokenize_are_inverse(mesh):
    stub = InferenceStub(mesh[2])
    ids = (await stub.Tokenize(pb.TokenizeRequest(text=TEXT))).token_ids
    assert bytes(ids).decode() == TEXT
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == TEXT


async def test_the_model_and_its_context_are_listed(mesh):
    models = (await InferenceStub(mesh[2]).ListModels(pb.ListModelsRequest())).models
    assert list(models) == [pb.Model(id=MODEL_ID, max_context_tokens=4096)]


async def test_health_is_answered(mesh):
    stub = health_pb2_grpc.HealthStub(mesh[2])
    answer = await stub.Check(health_pb2.HealthCheckRequest(service="isthmus.v1.Inference"))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_callers_trace_goes_on_to_both_workers(mesh):
    prefill, decode, channel = mesh
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    call = InferenceStub(channel).Generate(
        pb.GenerateRequest(text="x"),
        metadata=(("traceparent", f"00-{trace_id}-b7ad6b7169203331-01"),),
    )
    async for _ in call:
        pass
    assert decode.submitted[0].traceparent.split("-")[1] == trace_id
    assert prefill.metadata[0]["traceparent"] == decode.submitted[0].traceparent
