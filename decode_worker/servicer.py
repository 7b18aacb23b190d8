"""gRPC face of the decode worker: one long-lived stream for each gateway."""

import asyncio
from collections.abc import AsyncIterator

from grpc import aio

from decode_worker.stream import Aborted, Degraded, GatewayStream, Output
from engine.errors import InvalidRequestError
from engine.request import Request
from engine.runtime.commands import ErrorEvent, RequestEngine, SequenceMode, TokenEvent
from kv_transfer.receiver import KvReceiver
from mesh.convert import finish_reason_to_pb, logprobs_to_pb, sampling_from_pb
from mesh.status import status_of
from mesh.stream_write import write_whole
from mesh.telemetry import context_from_traceparent
from protos.isthmus.v1 import decode_pb2 as pb
from protos.isthmus.v1 import decode_pb2_grpc as pb_grpc
from protos.isthmus.v1.inference_pb2 import Degradation

Context = aio.ServicerContext[pb.ServeRequest, pb.ServeResponse]


class DecodeServicer(pb_grpc.DecodeServiceServicer):
    def __init__(self, engine: RequestEngine, receiver: KvReceiver) -> None:
        self._engine = engine
        self._receiver = receiver
        self._streams: set[GatewayStream] = set()

    async def drained(self) -> None:
        """Return when no gateway has a sequence open."""
        for stream in list(self._streams):
            await stream.drained()

    async def Serve(self, requests: AsyncIterator[pb.ServeRequest], context: Context) -> None:
        """Answer each engine step with one message; the stream's end aborts its sequences."""
        stream = GatewayStream(self._engine, self._receiver)
        self._streams.add(stream)
        try:
            async with asyncio.TaskGroup() as tasks:
                writer = tasks.create_task(_write_outputs(stream, context), name="decode-outputs")
                async for request in requests:
                    _apply(request, stream)
                writer.cancel()
        finally:
            self._streams.discard(stream)
            await stream.abort_all()


async def _write_outputs(stream: GatewayStream, context: Context) -> None:
    while True:
        outputs = await stream.next_outputs()
        message = pb.ServeResponse(outputs=[_output_to_pb(output) for output in outputs])
        await write_whole(context, message)


def _apply(request: pb.ServeRequest, stream: GatewayStream) -> None:
    match request.WhichOneof("command"):
        case "submit":
            _submit(request.submit, stream)
        case "abort":
            stream.abort(request.abort.request_id)
        case _:
            raise InvalidRequestError("ServeRequest.command must be submit or abort")


def _submit(message: pb.SubmitSequence, stream: GatewayStream) -> None:
    try:
        request = Request(
            request_id=message.request_id,
            prompt_token_ids=tuple(message.prompt_token_ids),
            output_token_ids=tuple(message.output_token_ids),
            sampling=sampling_from_pb(message.sampling),
        )
    except InvalidRequestError as error:
        stream.put([ErrorEvent(message.request_id, error)])
        return
    stream.submit(
        request,
        SequenceMode.LOCAL if message.prefill_locally else SequenceMode.DECODE,
        trace_context=context_from_traceparent(message.traceparent),
    )


def _output_to_pb(output: Output) -> pb.SequenceOutput:
    match output:
        case TokenEvent():
            return pb.SequenceOutput(request_id=output.request_id, token=_token_to_pb(output))
        case Aborted():
            return pb.SequenceOutput(
                request_id=output.request_id,
                aborted=pb.AbortedSequence(num_freed_blocks=output.num_freed_blocks),
            )
        case Degraded(request_id=request_id, kind=kind, reason=reason):
            return pb.SequenceOutput(
                request_id=request_id, degraded=Degradation(kind=kind, reason=reason)
            )
        case ErrorEvent(request_id=request_id, error=error):
            code, text = status_of(error)
            number: int = code.value[0]
            return pb.SequenceOutput(
                request_id=request_id, error=pb.SequenceError(status_code=number, message=text)
            )


def _token_to_pb(token: TokenEvent) -> pb.DecodedToken:
    message = pb.DecodedToken(
        token_id=token.token_id, finish_reason=finish_reason_to_pb(token.finish_reason)
    )
    if token.logprobs is not None:
        message.logprobs.CopyFrom(logprobs_to_pb(token.logprobs))
    if (first := token.first) is not None:
        message.first_step.CopyFrom(
            pb.FirstStepReport(
                queue_ns=first.scheduled_ns - first.arrived_ns,
                step_ns=first.done_ns - first.scheduled_ns,
                prefilled_locally=first.prefilled_locally,
                num_cached_tokens=first.num_cached_tokens,
            )
        )
    return message
