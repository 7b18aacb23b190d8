"""Workers of several ranks, as `isthmus up` starts them, give the tokens of one rank."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from engine.checkpoint.locate import default_cache_dir, locate_model
from engine.parallel import ParallelLayout
from engine.request import SamplingParams
from mesh.channel import open_channel
from mesh.convert import sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.one_engine import OneEngine, one_engine
from tests.e2e.prompts import text_of_length
from tests.e2e.test_trace import SERVICE_OF
from tests.e2e.trace_collector import trace_collector

LENGTHS = (1, 33, 300)
NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM = 30, 3, 64  # of the demo model
NUM_BYTES = sum(LENGTHS) * NUM_LAYERS * NUM_KV_HEADS * 2 * HEAD_DIM * 4
"""Of the prompts' KV: on up to three ranks no head is held twice."""
NAMES = SERVICE_OF.keys() - {"tokenise"}  # prompts are given as tokens
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
LAYOUTS = [
    pytest.param(prefill, decode, id=f"{prefill}-to-{decode}")
    for prefill, decode in (("tp=2", "tp=3"), ("tp=3", "tp=2"), ("pp=2,interleave=2", "pp=2"))
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


async def complete(
    stub: pb_grpc.InferenceStub, prompt: Sequence[int], trace_id: bytes
) -> list[int]:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=prompt), sampling=sampling_to_pb(GREEDY))
    token_ids: list[int] = []
    traceparent = f"00-{trace_id.hex()}-{os.urandom(8).hex()}-01"
    async for response in stub.Generate(request, metadata=(("traceparent", traceparent),)):
        for delta in response.deltas:
            token_ids += delta.token_ids
        assert not response.report.degradations, response.report
    return token_ids


@pytest.mark.parametrize(("prefill", "decode"), LAYOUTS)
async def test_a_mesh_of_rank_groups_gives_the_tokens_of_one_rank(
    prefill: str, decode: str, single: OneEngine, tmp_path: Path
) -> None:
    flags = ("--dtype", "float32", "--prefill-parallel", prefill, "--decode-parallel", decode)
    trace_ids = [os.urandom(16) for _ in LENGTHS]
    with trace_collector() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
        with mesh_process(tmp_path, *flags, environment=environment) as mesh:
            async with open_channel(mesh.grpc) as channel:
                stub = pb_grpc.InferenceStub(channel)
                asked = await prompts(stub)
                answers = await asyncio.gather(*map(complete, repeat(stub), asked, trace_ids))
            check_metrics(mesh, prefill, decode)
            traces = [collector.wait_for_trace(each, NAMES, timeout_s=30) for each in trace_ids]
    for prompt, answer, spans in zip(asked, answers, traces, strict=True):
        assert answer == single.answer(prompt, GREEDY).token_ids, f"{len(prompt)} tokens"
        (crossing,) = (span for span in spans if span.name == "kv.transfer")
        assert attribute(crossing, "num_tokens") == len(prompt)
        assert attribute(crossing, "num_bytes") == NUM_BYTES // sum(LENGTHS) * len(prompt)


def check_metrics(mesh: MeshProcess, prefill: str, decode: str) -> None:
    """Every prompt token was computed by the prefill worker, and crossed once."""
    assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
    assert mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") == sum(LENGTHS)
    assert mesh.metric("decode", "isthmus_handover_received_tokens_total") == sum(LENGTHS)
    assert mesh.metric("decode", "isthmus_handover_received_bytes_total") == NUM_BYTES
    assert mesh.metric("prefill", "isthmus_handover_bytes_total") == NUM_BYTES
    for role, layout in (("prefill", prefill), ("decode", decode)):
        assert len(mesh.processes(role)[0]["rank_pids"]) == ParallelLayout.parse(layout).num_ranks
        assert mesh.metric(role, "isthmus_rank_steps_total", rank="1") > 0
        communication_s = mesh.metric(role, "isthmus_rank_communication_seconds_total")
        step_s = mesh.metric(role, "isthmus_rank_step_seconds_total")
        share = mesh.metric(role, "isthmus_rank_communication_share")
        assert share == pytest.approx(communication_s / step_s, rel=0.01)
        bubble = mesh.metric(role, "isthmus_pipeline_bubble_share")
        assert (0.1 < bubble < 0.9) if "pp=2" in layout else bubble == 0


def attribute(span: Span, name: str) -> int:
    return next(each.value.int_value for each in span.attributes if each.key == name)
