"""One trace for each request, and its spans account for the request's wall time."""

import os
from pathlib import Path

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.trace_collector import trace_collector

SERVICE_OF = {
    **dict.fromkeys(("request", "tokenise", "route"), "isthmus-gateway"),
    **dict.fromkeys(("prefill.queue", "prefill"), "isthmus-prefill"),
    **dict.fromkeys(("kv.reserve", "kv.transfer", "kv.commit"), "isthmus-prefill"),
    "kv.exposed": "isthmus-prefill",
    **dict.fromkeys(("decode.queue", "decode.first_step", "decode"), "isthmus-decode"),
}
"""The process that each span comes from, by the span's name."""
TEXTS = ("The isthmus ", "A narrow strip ", "Between two seas ")
"""Of a prompt each, many times over, so that it takes several chunks and none is in the cache."""
NUM_TIMES, NUM_TOKENS = 400, 48


def uncovered_share(root: Span, others: list[Span]) -> float:
    """Share of `root`'s duration in which none of `others` is open."""
    covered_ns, reached_ns = 0, root.start_time_unix_nano
    for span in sorted(others, key=lambda span: span.start_time_unix_nano):
        start_ns = max(span.start_time_unix_nano, reached_ns)
        end_ns = min(span.end_time_unix_nano, root.end_time_unix_nano)
        if end_ns > start_ns:
            covered_ns += end_ns - start_ns
            reached_ns = end_ns
    return 1 - covered_ns / (root.end_time_unix_nano - root.start_time_unix_nano)


async def ask_http(mesh: MeshProcess, text: str, traceparent: str) -> None:
    body = {"prompt": text, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=mesh.http, timeout=120) as client:
        headers = {"traceparent": traceparent}
        response = await client.post("/v1/completions", json=body, headers=headers)
        assert response.status_code == 200, response.text


async def ask_grpc(mesh: MeshProcess, text: str, traceparent: str) -> None:
    message = pb.ChatMessage(role="user", content=text)
    sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
    request = pb.ChatRequest(messages=[message], sampling=sampling)
    async with open_channel(mesh.grpc) as channel:
        stub = pb_grpc.InferenceStub(channel)
        async for _ in stub.Chat(request, metadata=(("traceparent", traceparent),)):
            pass


async def test_one_trace_covers_the_request(tmp_path: Path) -> None:
    with trace_collector() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
        with mesh_process(tmp_path, environment=environment) as mesh:
            traces = []
            asks = (ask_http, ask_http, ask_grpc)  # the first one warms the path
            for ask, text in zip(asks, TEXTS, strict=True):
                trace_id = os.urandom(16)
                await ask(mesh, text * NUM_TIMES, f"00-{trace_id.hex()}-{os.urandom(8).hex()}-01")
                traces.append(collector.wait_for_trace(trace_id, set(SERVICE_OF), timeout_s=30))
        for spans in traces[1:]:
            (root,) = (span for span in spans if span.name == "request")
            named = [span for span in spans if span.name in SERVICE_OF and span is not root]
            assert uncovered_share(root, named) < 0.05
            assert {span.span_id for span in spans} >= {
                span.parent_span_id for span in spans if span is not root
            }
            by_name = {span.name: span for span in named}
            transfer, prefill = by_name["kv.transfer"], by_name["prefill"]
            assert transfer.start_time_unix_nano < prefill.end_time_unix_nano, "pushed as computed"
            assert {s.name: collector.service_of[s.span_id] for s in [root, *named]} == SERVICE_OF
