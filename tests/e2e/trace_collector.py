"""A real OTLP receiver in the test's process: keeps the spans that the mesh exports."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as pb_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span


class TraceCollector(pb_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.port = 0
        self._spans: list[Span] = []
        self.service_of: dict[bytes, str] = {}
        """By span id: service.name of the process that exported it."""
        self._arrived = threading.Condition()

    def Export(
        self, request: pb.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> pb.ExportTraceServiceResponse:
        with self._arrived:
            for resource_spans in request.resource_spans:
                attributes = {
                    a.key: a.value.string_value for a in resource_spans.resource.attributes
                }
                for scope_spans in resource_spans.scope_spans:
                    self._spans.extend(scope_spans.spans)
                    for span in scope_spans.spans:
                        self.service_of[span.span_id] = attributes["service.name"]
            self._arrived.notify_all()
        return pb.ExportTraceServiceResponse()

    def wait_for_trace(self, trace_id: bytes, names: set[str], *, timeout_s: float) -> list[Span]:
        """All spans of a trace, once every one of `names` is among them."""

        def found() -> bool:
            return names <= {span.name for span in self._trace(trace_id)}

        with self._arrived:
            assert self._arrived.wait_for(found, timeout_s), (
                f"missing spans: {names - {span.name for span in self._trace(trace_id)}}"
            )
            return self._trace(trace_id)

    def _trace(self, trace_id: bytes) -> list[Span]:
        return [span for span in self._spans if span.trace_id == trace_id]


@contextmanager
def trace_collector() -> Iterator[TraceCollector]:
    """Listen on a free port of the loopback interface."""
    collector = TraceCollector()
    server = grpc.server(ThreadPoolExecutor(max_workers=4))
    pb_grpc.add_TraceServiceServicer_to_server(collector, server)
    collector.port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector
    finally:
        server.stop(None).wait()
