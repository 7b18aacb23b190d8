"""One trace for each request, and its spans account for the request's wall time."""

import os
from pathlib import Path

import httpx
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.e2e.mesh_process import mesh_process
from tests.e2e.trace_collector import trace_collector

SPAN_NAMES = {
    *("request", "tokenise", "route", "prefill.queue", "prefill", "kv.reserve", "kv.transfer"),
    *("kv.commit", "decode.queue", "decode.first_step", "decode"),
}


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


def test_one_trace_covers_the_request(tmp_path: Path) -> None:
    trace_id = os.urandom(16)
    traceparent = f"00-{trace_id.hex()}-{os.urandom(8).hex()}-01"
    with trace_collector() as collector:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}"}
        with mesh_process(tmp_path, environment=environment) as mesh:
            body = {"prompt": "The isthmus " * 200, "max_tokens": 48, "ignore_eos": True}
            for headers in ({}, {"traceparent": traceparent}):  # the first one warms the path
                response = httpx.post(
                    f"{mesh.http}/v1/completions", json=body, headers=headers, timeout=120
                )
                assert response.status_code == 200, response.text
            spans = collector.wait_for_trace(trace_id, SPAN_NAMES, timeout_s=30)
    (root,) = (span for span in spans if span.name == "request")
    named = [span for span in spans if span.name in SPAN_NAMES - {"request"}]
    assert uncovered_share(root, named) < 0.05
    assert {span.span_id for span in spans} >= {
        span.parent_span_id for span in spans if span is not root
    }
