import asyncio
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from grpc import aio
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from engine.runtime.commands import PrefixFetchEvent
from mesh.channel import open_channel
from mesh.server import listening
from mesh.telemetry import (
    child_span,
    context_from_call,
    context_from_traceparent,
    record_fetch,
    span_between,
)
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{PARENT_ID}-01"

CHILD = """
import sys, time, uvloop
from mesh.telemetry import context_from_traceparent, exporting_spans, span_between

async def main():
    with exporting_spans("isthmus-child", instance_id="c0", otlp_endpoint=sys.argv[1]):
        context = context_from_traceparent(sys.argv[2])
        span_between("prefill", 1_000, 5_000, context=context, attributes={"num_tokens": 3})

uvloop.run(main())
"""


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """What stands where Jaeger would."""

    def __init__(self) -> None:
        self.received: asyncio.Queue[ResourceSpans] = asyncio.Queue()

    async def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: aio.ServicerContext[Any, Any],
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for spans in request.resource_spans:
            self.received.put_nowait(spans)
        return trace_service_pb2.ExportTraceServiceResponse()


class ContextKeepingServicer(pb_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.contexts: list[Context | None] = []

    async def ListModels(
        self, request: pb.ListModelsRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        self.contexts.append(context_from_call(context))
        return pb.ListModelsResponse()


@asynccontextmanager
async def exporting_child(endpoint: str) -> AsyncIterator[asyncio.subprocess.Process]:
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, endpoint, TRACEPARENT, stderr=asyncio.subprocess.PIPE
    )
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()


async def test_spans_of_a_process_reach_the_collector_before_it_ends() -> None:
    collector = Collector()
    async with (
        listening(
            lambda server: trace_service_pb2_grpc.add_TraceServiceServicer_to_server(
                collector, server
            ),
            address="127.0.0.1:0",
            drain_grace_s=0,
        ) as port,
        exporting_child(f"http://127.0.0.1:{port}") as child,
    ):
        _, errors = await asyncio.wait_for(child.communicate(), timeout=60)
        assert child.returncode == 0, errors.decode()
        received = collector.received.get_nowait()
    resource = {item.key: item.value.string_value for item in received.resource.attributes}
    assert resource["service.name"] == "isthmus-child"
    assert resource["service.instance.id"] == "c0"
    (span,) = received.scope_spans[0].spans
    assert (span.name, span.start_time_unix_nano, span.end_time_unix_nano) == (
        "prefill",
        1_000,
        5_000,
    )
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE_ID, PARENT_ID)


async def test_a_collector_that_is_gone_does_not_hold_the_process_up() -> None:
    async with listening(lambda _: None, address="127.0.0.1:0", drain_grace_s=0) as port:
        pass  # nobody listens there any more
    async with exporting_child(f"http://127.0.0.1:{port}") as child:
        _, errors = await asyncio.wait_for(child.communicate(), timeout=60)
    assert child.returncode == 0
    assert b"Traceback" not in errors


async def test_the_context_of_a_call_arrives(recorded_spans: InMemorySpanExporter) -> None:
    servicer = ContextKeepingServicer()
    async with (
        listening(
            lambda server: pb_grpc.add_InferenceServicer_to_server(servicer, server),
            address="127.0.0.1:0",
            drain_grace_s=0,
        ) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        stub = pb_grpc.InferenceStub(channel)
        for metadata in ((("traceparent", TRACEPARENT),), (("traceparent", "junk"),), None):
            await stub.ListModels(pb.ListModelsRequest(), metadata=metadata)
    arrived, *others = servicer.contexts
    assert others == [None, None]
    span_between("prefill", 1, 2, context=arrived)
    (span,) = recorded_spans.get_finished_spans()
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE_ID
    assert f"{span.parent.span_id:016x}" == PARENT_ID


def test_a_span_has_the_marks_it_was_given(recorded_spans: InMemorySpanExporter) -> None:
    start_ns = time.time_ns()
    context = context_from_traceparent(TRACEPARENT)
    span_between("decode", start_ns, start_ns + 7, context=context, attributes={"num_tokens": 3})
    (span,) = recorded_spans.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("decode", start_ns, start_ns + 7)
    assert dict(span.attributes or {}) == {"num_tokens": 3}


def test_a_fetch_says_what_was_decided_and_why(recorded_spans: InMemorySpanExporter) -> None:
    event = PrefixFetchEvent("r", "compute", "deadline", 0, 0, 5, 9, has_failed=True)
    record_fetch(event, context_from_traceparent(TRACEPARENT))
    record_fetch(event, None)
    (span,) = recorded_spans.get_finished_spans()
    assert (span.name, span.start_time, span.end_time) == ("kv.fetch", 5, 9)
    assert dict(span.attributes or {}) == {
        "decision": "compute",
        "reason": "deadline",
        "num_tokens": 0,
        "num_bytes": 0,
    }


def test_a_request_without_a_trace_records_nothing(recorded_spans: InMemorySpanExporter) -> None:
    span_between("decode", 1, 2, context=None)
    assert recorded_spans.get_finished_spans() == ()


def test_a_request_that_is_not_sampled_records_nothing(
    recorded_spans: InMemorySpanExporter,
) -> None:
    context = context_from_traceparent(f"00-{TRACE_ID}-{PARENT_ID}-00")
    assert context is not None
    span_between("decode", 1, 2, context=context)
    assert recorded_spans.get_finished_spans() == ()


@pytest.mark.parametrize(
    "traceparent", ["", "junk", f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"]
)
def test_what_is_no_traceparent_is_no_context(traceparent: str) -> None:
    assert context_from_traceparent(traceparent) is None


def test_a_context_holds_the_callers_span() -> None:
    context = context_from_traceparent(TRACEPARENT)
    assert context is not None
    assert f"{trace.get_current_span(context).get_span_context().trace_id:032x}" == TRACE_ID


def test_a_part_of_a_request_is_a_span_inside_it(recorded_spans: InMemorySpanExporter) -> None:
    tracer = trace.get_tracer("test")
    with tracer.start_as_current_span("request"), child_span(tracer, "part"):
        pass
    part, request = recorded_spans.get_finished_spans()
    assert part.name == "part"
    assert part.parent == request.get_span_context()


def test_a_part_of_what_is_not_recorded_is_no_span(recorded_spans: InMemorySpanExporter) -> None:
    with child_span(trace.get_tracer("test"), "part") as span:
        span.set_attribute("num_tokens", 1)
    assert recorded_spans.get_finished_spans() == ()
