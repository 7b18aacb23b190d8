"""Calls to one prefill worker."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from grpc import aio

from engine.errors import IsthmusError, PeerUnavailableError
from mesh.channel import is_cancelled, open_channel
from mesh.status import ERROR_TRAILER, error_from_rpc
from protos.isthmus.v1.prefill_pb2 import AbortRequest, PrefillRequest, PrefillResponse
from protos.isthmus.v1.prefill_pb2_grpc import PrefillServiceStub

logger = logging.getLogger(__name__)

ABORT_TIMEOUT_S = 5.0


class PrefillGoneError(PeerUnavailableError):
    """The prefill worker itself cannot be reached; it did not say this of its peer."""


class PrefillClient:
    """A prefill worker's channel; it connects with the first call."""

    def __init__(self, worker_id: str, address: str) -> None:
        self.worker_id = worker_id
        self.address = address
        self._channel = open_channel(address)
        self._stub = PrefillServiceStub(self._channel)
        self._is_closed = False

    @asynccontextmanager
    async def prefill(
        self, request: PrefillRequest, traceparent: str
    ) -> AsyncIterator[AsyncIterator[PrefillResponse]]:
        """Run a prefill inside the block; leaving it early cancels the call on the worker.

        Raises:
            PrefillGoneError: this worker cannot be reached.
            IsthmusError: what the worker answered.
        """
        metadata = (("traceparent", traceparent),) if traceparent else None
        if self._is_closed:
            raise self._left()
        call = self._stub.Prefill(request, metadata=metadata)
        try:
            yield _responses(call)
        except aio.AioRpcError as error:
            raise _error_from(error) from error
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise self._left() from None
        finally:
            call.cancel()

    async def abort(self, request_id: str) -> int:
        """Blocks that were freed; a worker that cannot be reached has freed them by dying."""
        if self._is_closed:
            return 0
        try:
            answer = await self._stub.Abort(
                AbortRequest(request_id=request_id), timeout=ABORT_TIMEOUT_S
            )
        except aio.AioRpcError as error:
            logger.info("abort not acknowledged request_id=%s: %s", request_id, error.code())
            return 0
        return int(answer.num_freed_blocks)

    async def aclose(self, grace_s: float | None = None) -> None:
        """Close the channel; calls that are open have `grace_s` to end, and no new ones begin."""
        self._is_closed = True
        await self._channel.close(grace_s)

    def _left(self) -> PrefillGoneError:
        return PrefillGoneError(f"prefill worker {self.worker_id} has left the mesh")


async def _responses(
    call: "aio.UnaryStreamCall[PrefillRequest, PrefillResponse]",
) -> AsyncIterator[PrefillResponse]:
    while isinstance(response := await call.read(), PrefillResponse):
        yield response


def _error_from(error: aio.AioRpcError) -> IsthmusError:
    """An answer of the worker carries the error's name; a broken connection does not."""
    known = error_from_rpc(error)
    is_answer = any(key == ERROR_TRAILER for key, _ in error.trailing_metadata() or ())
    if isinstance(known, PeerUnavailableError) and not is_answer:
        return PrefillGoneError(str(known))
    return known
