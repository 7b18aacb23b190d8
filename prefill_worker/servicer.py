"""gRPC face of the prefill worker: translate, run the job, translate back."""

from grpc import aio

from engine.request import Request
from engine.runtime.commands import PrefixFetchEvent, TokenEvent
from mesh.convert import finish_reason_to_pb, logprobs_to_pb, sampling_from_pb
from mesh.stream_write import write_whole
from mesh.telemetry import context_from_call, record_fetch
from prefill_worker.prefill import Prefiller, PrefillJob
from prefill_worker.spans import record_handover, record_prefill
from protos.isthmus.v1 import prefill_pb2 as pb
from protos.isthmus.v1 import prefill_pb2_grpc as pb_grpc


class PrefillServicer(pb_grpc.PrefillServiceServicer):
    def __init__(self, prefiller: Prefiller) -> None:
        self._prefiller = prefiller

    async def Prefill(
        self,
        request: pb.PrefillRequest,
        context: aio.ServicerContext[pb.PrefillRequest, pb.PrefillResponse],
    ) -> None:
        """Stream the first token, then what the handover took."""
        trace_context = context_from_call(context)

        fetch_failure = ""

        def note_fetch(event: PrefixFetchEvent) -> None:
            nonlocal fetch_failure
            fetch_failure = event.reason if event.has_failed else ""
            record_fetch(event, trace_context)

        async def emit_token(token: TokenEvent) -> None:
            record_prefill(token, trace_context)
            await write_whole(context, _first_token_to_pb(token, fetch_failure))

        report = await self._prefiller.run(_job_from(request), emit_token, note_fetch)
        if report is not None:
            record_handover(report, trace_context)
            await write_whole(context, pb.PrefillResponse(handover=report.to_pb()))

    async def Abort(
        self,
        request: pb.AbortRequest,
        context: aio.ServicerContext[pb.AbortRequest, pb.AbortResponse],
    ) -> pb.AbortResponse:
        """Answers once the blocks are free on both workers."""
        return pb.AbortResponse(num_freed_blocks=await self._prefiller.abort(request.request_id))


def _job_from(request: pb.PrefillRequest) -> PrefillJob:
    return PrefillJob(
        request=Request(
            request_id=request.request_id,
            prompt_token_ids=tuple(request.prompt_token_ids),
            output_token_ids=tuple(request.output_token_ids),
            sampling=sampling_from_pb(request.sampling),
        ),
        decode_worker_id=request.decode_worker_id,
        decode_address=request.decode_address,
    )


def _first_token_to_pb(token: TokenEvent, fetch_failure: str) -> pb.PrefillResponse:
    assert token.first is not None, f"first token of {token.request_id} without its timing"
    message = pb.FirstToken(
        token_id=token.token_id,
        logprobs=logprobs_to_pb(token.logprobs) if token.logprobs else None,
        finish_reason=finish_reason_to_pb(token.finish_reason),
        num_cached_tokens=token.first.num_cached_tokens,
        queue_ns=token.first.scheduled_ns - token.first.arrived_ns,
        compute_ns=token.first.done_ns - token.first.scheduled_ns,
        fetch_failure=fetch_failure,
    )
    return pb.PrefillResponse(first_token=message)
