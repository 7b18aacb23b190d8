import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc import StatusCode, aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from engine.errors import (
    CapacityError,
    EngineDeadError,
    InvalidRequestError,
    IsthmusError,
    PeerUnavailableError,
)
from mesh.channel import open_channel
from mesh.limits import MAX_MESSAGE_BYTES
from mesh.server import ServerHealth, listening
from mesh.status import STATUS_OF, error_from_rpc
from mesh.stream_write import write_whole
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc

SERVICE = "isthmus.v1.Inference"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class RaisingServicer(pb_grpc.InferenceServicer):
    """Raises what the test put in; unary in ListModels, after one message in Generate."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.may_end = asyncio.Event()

    async def ListModels(
        self, request: pb.ListModelsRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.ListModelsResponse:
        if self.error is not None:
            raise self.error
        return pb.ListModelsResponse(models=[pb.Model(id="a")])

    async def Generate(
        self, request: pb.GenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> None:
        await context.write(pb.GenerateResponse(request_id="a"))
        if self.error is not None:
            raise self.error
        await self.may_end.wait()

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: aio.ServicerContext[Any, Any]
    ) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(token_ids=[len(request.text)])


async def until_end(call: "aio.UnaryStreamCall[Any, Any]") -> None:
    while await call.read() is not aio.EOF:
        pass


@asynccontextmanager
async def serving(
    servicer: pb_grpc.InferenceServicer,
    *,
    health: ServerHealth | None = None,
    drain_grace_s: float = 0,
) -> AsyncIterator[aio.Channel]:
    async with (
        listening(
            lambda server: pb_grpc.add_InferenceServicer_to_server(servicer, server),
            address="127.0.0.1:0",
            drain_grace_s=drain_grace_s,
            health=health,
            service_names=[SERVICE],
        ) as port,
        open_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield channel


class CutServicer(pb_grpc.InferenceServicer):
    """Fails while a message to a client that does not read is under way."""

    def __init__(self) -> None:
        self.has_failed = asyncio.Event()

    async def Generate(
        self, request: pb.GenerateRequest, context: aio.ServicerContext[Any, Any]
    ) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._fail())
            while True:
                await write_whole(context, pb.GenerateResponse(request_id="a" * 1_000_000))

    async def _fail(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)  # until the first write has begun
        self.has_failed.set()
        raise CapacityError("full")


@pytest.mark.parametrize("error_class", STATUS_OF)
async def test_an_error_arrives_as_the_one_that_was_raised(
    error_class: type[IsthmusError],
) -> None:
    servicer = RaisingServicer()
    servicer.error = error_class("what to change")
    async with serving(servicer) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
    assert caught.value.code() is STATUS_OF[error_class]
    error = error_from_rpc(caught.value)
    assert type(error) is error_class
    assert str(error) == "what to change"


async def test_an_error_after_the_first_message_ends_the_stream_with_its_code() -> None:
    servicer = RaisingServicer()
    servicer.error = EngineDeadError("the engine is gone")
    async with serving(servicer) as channel:
        call = pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest())
        assert (await call.read()).request_id == "a"
        with pytest.raises(aio.AioRpcError, match="the engine is gone") as caught:
            await call.read()
    assert type(error_from_rpc(caught.value)) is EngineDeadError


async def test_an_error_while_a_message_is_under_way_ends_the_stream_with_its_code() -> None:
    servicer = CutServicer()
    async with serving(servicer) as channel, asyncio.timeout(30):
        call = pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest())
        await servicer.has_failed.wait()
        with pytest.raises(aio.AioRpcError, match="full") as caught:
            await until_end(call)
    assert type(error_from_rpc(caught.value)) is CapacityError


async def test_capacity_says_when_to_come_back() -> None:
    servicer = RaisingServicer()
    servicer.error = CapacityError("full")
    async with serving(servicer) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
    assert dict(caught.value.trailing_metadata())["retry-after-ms"] == "1000"


async def test_a_bug_shows_no_detail() -> None:
    servicer = RaisingServicer()
    servicer.error = KeyError("secret")
    async with serving(servicer) as channel:
        with pytest.raises(aio.AioRpcError, match="internal error") as caught:
            await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
    assert caught.value.code() is StatusCode.INTERNAL
    assert type(error_from_rpc(caught.value)) is IsthmusError


@pytest.mark.parametrize("body", [b"\x0a\x02\xff\xfe", b"\x12\x7fabc", bytes(range(200, 256))])
async def test_bytes_that_are_no_message_are_an_invalid_argument(body: bytes) -> None:
    """Text that is not UTF-8, a message cut off, and noise; grpc itself would say UNKNOWN."""
    async with serving(RaisingServicer()) as channel:
        with pytest.raises(aio.AioRpcError, match="cannot be decoded") as caught:
            await channel.unary_unary(f"/{SERVICE}/Tokenize", bytes)(body)
        assert type(error_from_rpc(caught.value)) is InvalidRequestError
        stream: aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(
            f"/{SERVICE}/Generate", bytes
        )
        with pytest.raises(aio.AioRpcError) as caught:
            await stream(body).read()
        assert caught.value.code() is StatusCode.INVALID_ARGUMENT


async def test_a_method_that_is_not_written_stays_unimplemented() -> None:
    async with serving(RaisingServicer()) as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await pb_grpc.InferenceStub(channel).Detokenize(pb.DetokenizeRequest())
    assert caught.value.code() is StatusCode.UNIMPLEMENTED


async def test_nobody_listening_is_an_unavailable_peer() -> None:
    async with listening(lambda _: None, address="127.0.0.1:0", drain_grace_s=0) as port:
        pass  # the port was free, and is again
    async with open_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(aio.AioRpcError) as caught:
            await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=10)
    assert type(error_from_rpc(caught.value)) is PeerUnavailableError


async def test_a_message_past_grpcs_default_passes_and_one_past_ours_is_refused() -> None:
    async with serving(RaisingServicer()) as channel:
        stub = pb_grpc.InferenceStub(channel)
        reply = await stub.Tokenize(pb.TokenizeRequest(text="x" * 5_000_000))
        assert list(reply.token_ids) == [5_000_000]
        with pytest.raises(aio.AioRpcError, match="larger than max") as caught:
            await stub.Tokenize(pb.TokenizeRequest(text="x" * (MAX_MESSAGE_BYTES + 1)))
    assert type(error_from_rpc(caught.value)) is InvalidRequestError


async def test_health_follows_the_owner() -> None:
    health = ServerHealth()
    async with serving(RaisingServicer(), health=health) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request)).status == NOT_SERVING
        await health.set_serving()
        for name in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=name)
            assert (await stub.Check(request)).status == SERVING


async def test_drain_says_not_serving_first_and_lets_open_calls_end() -> None:
    servicer, health = RaisingServicer(), ServerHealth()
    leave = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        ready: asyncio.Future[aio.Channel] = asyncio.get_running_loop().create_future()

        async def serve() -> None:
            async with listening(
                lambda server: pb_grpc.add_InferenceServicer_to_server(servicer, server),
                address="127.0.0.1:0",
                drain_grace_s=20,
                health=health,
                service_names=[SERVICE],
            ) as port:
                await health.set_serving()
                ready.set_result(open_channel(f"127.0.0.1:{port}"))
                await leave.wait()

        server = tasks.create_task(serve())
        channel = await ready
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == SERVING
        call = pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest())
        await call.read()

        leave.set()
        assert (await watch.read()).status == NOT_SERVING
        watch.cancel()
        assert not server.done()
        servicer.may_end.set()
        assert await call.read() is aio.EOF
        assert await call.code() is StatusCode.OK
        await server
        await channel.close()


async def test_a_port_in_use_is_named() -> None:
    async with listening(lambda _: None, address="127.0.0.1:0", drain_grace_s=0) as port:
        with pytest.raises(ValueError, match=f"127.0.0.1:{port}.*in use"):
            async with listening(lambda _: None, address=f"127.0.0.1:{port}", drain_grace_s=0):
                pytest.fail("two servers on one port")


async def test_reflection_lists_the_services() -> None:
    async with listening(
        lambda server: pb_grpc.add_InferenceServicer_to_server(RaisingServicer(), server),
        address="127.0.0.1:0",
        drain_grace_s=0,
        service_names=[SERVICE],
    ) as port:

        def names() -> set[str]:
            with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
                return set(ProtoReflectionDescriptorDatabase(channel).get_services())

        assert {SERVICE, "grpc.health.v1.Health"} <= await asyncio.to_thread(names)
