"""A prefill worker that leaves the registry while the gateway still has to do with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from grpc import aio

from gateway.prefill_client import PrefillClient, PrefillGoneError
from mesh.server import listening
from protos.isthmus.v1 import prefill_pb2 as pb
from protos.isthmus.v1 import prefill_pb2_grpc as pb_grpc


class Endless(pb_grpc.PrefillServiceServicer):
    """Never answers a prefill."""

    def __init__(self) -> None:
        self.has_begun = asyncio.Event()

    async def Prefill(
        self,
        request: pb.PrefillRequest,
        context: "aio.ServicerContext[pb.PrefillRequest, pb.PrefillResponse]",
    ) -> None:
        self.has_begun.set()
        await asyncio.Event().wait()


@asynccontextmanager
async def endless_worker() -> AsyncIterator[tuple[Endless, PrefillClient]]:
    servicer = Endless()

    def add(server: aio.Server) -> None:
        pb_grpc.add_PrefillServiceServicer_to_server(servicer, server)

    async with listening(add, address="127.0.0.1:0", drain_grace_s=0) as port:
        client = PrefillClient("prefill-0", f"127.0.0.1:{port}")
        yield servicer, client
        await client.aclose()


async def read(client: PrefillClient) -> None:
    async with client.prefill(pb.PrefillRequest(request_id="r"), "") as responses:
        async for _ in responses:
            pass


async def test_a_worker_that_left_freed_its_blocks_by_leaving() -> None:
    async with endless_worker() as (_, client):
        await client.aclose()
        assert await client.abort("r") == 0


async def test_a_prefill_on_a_worker_that_left_fails_over() -> None:
    async with endless_worker() as (_, client):
        await client.aclose()
        with pytest.raises(PrefillGoneError, match="prefill-0 has left the mesh"):
            await read(client)


async def test_a_prefill_that_is_open_when_its_worker_leaves_fails_over() -> None:
    async with endless_worker() as (servicer, client):
        reading = asyncio.ensure_future(read(client))
        await servicer.has_begun.wait()
        await client.aclose(0.01)
        with pytest.raises(PrefillGoneError, match="prefill-0 has left the mesh"):
            await reading


async def test_a_prefill_that_is_cancelled_by_its_caller_is_cancelled() -> None:
    async with endless_worker() as (servicer, client):
        reading = asyncio.ensure_future(read(client))
        await servicer.has_begun.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
