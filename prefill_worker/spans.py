"""Spans of one prefill, recorded after the fact from the engine's and the handover's marks."""

from opentelemetry.context import Context

from engine.runtime.commands import TokenEvent
from kv_transfer.report import HandoverReport
from mesh.telemetry import span_between


def record_prefill(token: TokenEvent, context: Context | None) -> None:
    """prefill.queue and prefill, from arrival to the first token."""
    timing = token.first
    if timing is None:
        return
    span_between("prefill.queue", timing.arrived_ns, timing.scheduled_ns, context=context)
    span_between(
        "prefill",
        timing.scheduled_ns,
        timing.done_ns,
        context=context,
        attributes={"num_cached_tokens": timing.num_cached_tokens},
    )


def record_handover(report: HandoverReport, context: Context | None) -> None:
    """kv.reserve, kv.transfer and kv.commit, which overlap prefill; kv.exposed: what does not."""
    span_between("kv.reserve", report.reserve_start_ns, report.reserve_end_ns, context=context)
    span_between(
        "kv.transfer",
        report.transfer_start_ns or report.commit_start_ns,
        report.transfer_end_ns or report.commit_start_ns,
        context=context,
        attributes={
            "num_bytes": report.num_bytes,
            "num_tokens": report.num_tokens,
            "num_cached_tokens": report.num_cached_tokens,
            "data_plane": report.data_plane,
            "retransfers": report.retransfers,
        },
    )
    span_between("kv.commit", *report.commit_span_ns, context=context)
    span_between("kv.exposed", *report.exposed_span_ns, context=context)
