"""OpenTelemetry for one process: spans go out by OTLP when an endpoint is set, else nowhere.

The context of a request crosses the mesh as a W3C traceparent: in the metadata of a call that
serves one request, in the message where a stream serves many.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from grpc import aio
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import Span, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from engine.runtime.commands import PrefixFetchEvent

TRACEPARENT = "traceparent"
OTLP_ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_EXPORT_DELAY_MS = 500
_EXPORT_TIMEOUT_S = 2
"""For one batch; a collector that is gone holds the end of the process up for about as long."""
_PROPAGATOR = TraceContextTextMapPropagator()


@contextmanager
def exporting_spans(
    service_name: str,
    *,
    instance_id: str,
    otlp_endpoint: str,
    exporter: SpanExporter | None = None,
) -> Iterator[None]:
    """Send the process' spans out inside the block; flushes on exit.

    Args:
        service_name: what Jaeger groups by, such as isthmus-prefill.
        instance_id: the worker's id.
        otlp_endpoint: http://host:port of an OTLP gRPC receiver; empty: spans cost nothing.
        exporter: instead of OTLP, for tests.
    """
    if exporter is None and not otlp_endpoint:
        yield
        return
    if exporter is None:
        # Imported here: it takes a quarter of a second that a process without traces saves.
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        insecure = not otlp_endpoint.startswith("https://")
        exporter = OTLPSpanExporter(
            endpoint=otlp_endpoint,
            insecure=insecure,
            timeout=_EXPORT_TIMEOUT_S,
            channel_options=(("grpc.enable_http_proxy", 0),),  # type: ignore[arg-type]  # int is right
        )
    resource = Resource.create({"service.name": service_name, "service.instance.id": instance_id})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(
        BatchSpanProcessor(exporter, schedule_delay_millis=_EXPORT_DELAY_MS)
    )
    trace.set_tracer_provider(provider)
    try:
        yield
    finally:
        provider.shutdown()


def child_span(tracer: Tracer, name: str) -> AbstractContextManager[Span]:
    """A span inside the current one, as current span; nothing when that one is not recorded."""
    if trace.get_current_span().is_recording():
        return tracer.start_as_current_span(name)
    return nullcontext(trace.INVALID_SPAN)


def span_between(
    name: str,
    start_ns: int,
    end_ns: int,
    *,
    context: Context | None,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> None:
    """Record a span whose marks (time.time_ns) are known already; without a context, nothing."""
    if context is None:
        return
    span = trace.get_tracer("isthmus").start_span(
        name, context=context, start_time=start_ns, attributes=attributes
    )
    span.end(end_ns)


def record_fetch(event: PrefixFetchEvent, context: Context | None) -> None:
    """kv.fetch: the decision about a prompt's missing part, and the fetch if there was one."""
    span_between(
        "kv.fetch",
        event.start_ns,
        event.end_ns,
        context=context,
        attributes={
            "decision": event.decision,
            "reason": event.reason,
            "num_tokens": event.num_tokens,
            "num_bytes": event.num_bytes,
        },
    )


def context_from_traceparent(traceparent: str) -> Context | None:
    """None when there is none, or when it is not a W3C traceparent."""
    if not traceparent:
        return None
    context = _PROPAGATOR.extract({TRACEPARENT: traceparent})
    return context if trace.get_current_span(context).get_span_context().is_valid else None


def context_from_call(call: aio.ServicerContext[Any, Any]) -> Context | None:
    """The caller's context, from the metadata of a call that serves one request."""
    for key, value in call.invocation_metadata() or ():
        if key == TRACEPARENT and isinstance(value, str):
            return context_from_traceparent(value)
    return None
