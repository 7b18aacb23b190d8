"""What `isthmus chat` and `isthmus demo` do with a gateway's stream."""

import asyncio

import pytest
from grpc import aio

from deploy.answer import open_channel, split_line, stream_answer
from engine.errors import CapacityError, InvalidRequestError
from mesh.server import listening
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc, sampling_pb2

SAMPLING = sampling_pb2.SamplingParams(max_tokens=3)


class Parrot(inference_pb2_grpc.InferenceServicer):
    """Streams the last message back word by word; "wait" never ends."""

    def __init__(self) -> None:
        self.was_cancelled = asyncio.Event()

    async def Chat(self, request, context) -> None:
        text = request.messages[-1].content
        if text == "refuse":
            raise InvalidRequestError("messages must not refuse")
        if text == "full":
            raise CapacityError("no queue slots")
        for word in text.split():
            await context.write(pb.ChatResponse(deltas=[pb.Delta(text=word)]))
        if text == "wait":
            try:
                await asyncio.Event().wait()
            finally:
                self.was_cancelled.set()
        usage = pb.Usage(num_prompt_tokens=1, num_completion_tokens=3)
        await context.write(
            pb.ChatResponse(usage=usage, report=pb.RequestReport(handover_bytes=1, handover_ns=1))
        )


@pytest.fixture
async def parrot():
    servicer = Parrot()

    def add(server: aio.Server) -> None:
        inference_pb2_grpc.add_InferenceServicer_to_server(servicer, server)

    async with (
        listening(add, address="127.0.0.1:0", drain_grace_s=0) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield servicer, channel


async def test_text_comes_as_it_is_streamed_and_the_report_at_the_end(parrot) -> None:
    _, channel = parrot
    heard: list[str] = []
    answer = await stream_answer(
        channel, [("user", "a b c")], sampling=SAMPLING, on_text=heard.append
    )
    assert "".join(heard) == "abc"
    assert answer.usage.num_completion_tokens == 3
    assert "handover" in split_line(answer)


@pytest.mark.parametrize(
    ("text", "error"), [("refuse", InvalidRequestError), ("full", CapacityError)]
)
async def test_what_the_gateway_refuses_is_raised_as_it_was(parrot, text, error) -> None:
    _, channel = parrot
    with pytest.raises(error):
        await stream_answer(channel, [("user", text)], sampling=SAMPLING, on_text=print)


async def test_stopping_an_answer_stops_it_at_the_gateway(parrot) -> None:
    servicer, channel = parrot
    started = asyncio.Event()
    task = asyncio.create_task(
        stream_answer(
            channel, [("user", "wait")], sampling=SAMPLING, on_text=lambda _: started.set()
        )
    )
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    async with asyncio.timeout(10):
        await servicer.was_cancelled.wait()
