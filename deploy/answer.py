"""One answer of a running mesh: streamed as it comes, with the split of its time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from grpc import aio

from mesh.channel import open_channel
from mesh.status import error_from_rpc
from protos.isthmus.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2

__all__ = ["Answer", "open_channel", "split_line", "stream_answer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the last message of the stream said."""

    usage: inference_pb2.Usage
    report: inference_pb2.RequestReport


async def stream_answer(
    channel: aio.Channel,
    messages: Sequence[tuple[str, str]],
    *,
    sampling: sampling_pb2.SamplingParams,
    on_text: Callable[[str], None],
) -> Answer:
    """Send a conversation of (role, content); cancelling this stops the answer on the workers.

    Raises:
        IsthmusError: what the mesh answered instead.
    """
    request = inference_pb2.ChatRequest(
        messages=[
            inference_pb2.ChatMessage(role=role, content=content) for role, content in messages
        ],
        sampling=sampling,
    )
    last = inference_pb2.ChatResponse()
    try:
        async for last in inference_pb2_grpc.InferenceStub(channel).Chat(request):
            for delta in last.deltas:
                on_text(delta.text)
    except aio.AioRpcError as error:
        raise error_from_rpc(error) from error
    return Answer(usage=last.usage, report=last.report)


def split_line(answer: Answer) -> str:
    """Where the time of a request went, in one line."""
    report, usage = answer.report, answer.usage
    parts = [
        f"queue {_ms(report.prefill_queue_ns)}",
        f"prefill {usage.num_prompt_tokens} tokens in {_ms(report.prefill_ns)}",
        _handover(report),
        f"first decode step {_ms(report.first_decode_step_ns)}",
        _decode_rate(report, usage),
        *(f"{left.kind} ({left.reason})" for left in report.degradations),
    ]
    return " | ".join(part for part in parts if part)


def _handover(report: inference_pb2.RequestReport) -> str:
    if not report.handover_bytes:
        return "no handover"
    rate = report.handover_bytes / max(report.handover_ns, 1)  # bytes/ns = GB/s
    return (
        f"handover {report.handover_bytes / 1e6:.2f} MB in {_ms(report.handover_ns)}"
        f" ({rate:.2f} GB/s, {report.data_plane})"
    )


def _decode_rate(report: inference_pb2.RequestReport, usage: inference_pb2.Usage) -> str:
    """Tokens after the first, over the time after the first."""
    decode_ns = report.total_ns - report.time_to_first_token_ns
    if usage.num_completion_tokens < 2 or decode_ns <= 0:
        return ""
    return f"{(usage.num_completion_tokens - 1) / (decode_ns / 1e9):.1f} tokens/s"


def _ms(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.1f} ms"
