"""The long-lived stream to one decode worker, shared by all its sequences."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from grpc import aio

from engine.errors import IsthmusError, PeerUnavailableError
from mesh.channel import open_channel
from mesh.status import error_from_rpc
from protos.isthmus.v1.decode_pb2 import (
    AbortSequence,
    SequenceOutput,
    ServeRequest,
    ServeResponse,
    SubmitSequence,
)
from protos.isthmus.v1.decode_pb2_grpc import DecodeServiceStub

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
MIN_BACKOFF_S = 0.05
MAX_BACKOFF_S = 2.0


class DecodeSink(Protocol):
    """Takes what a decode worker says of one sequence; neither method may block or raise."""

    def on_decode_output(self, request_id: str, output: SequenceOutput) -> None: ...

    def on_decode_lost(self, request_id: str, error: IsthmusError) -> None:
        """The stream broke: nothing more will come, and the worker has dropped the sequence."""


class DecodeStream:
    """Connects to a decode worker and stays connected until `run` is cancelled.

    Args:
        on_change: called when `is_available` has changed.
    """

    def __init__(self, worker_id: str, address: str, on_change: Callable[[], None]) -> None:
        self.worker_id = worker_id
        self.address = address
        self.is_available = False
        self.is_new = True
        """Has neither connected nor failed yet."""
        self.num_freed_blocks = 0
        """Blocks that acknowledged aborts gave back."""
        self._on_change = on_change
        self._sinks: dict[str, DecodeSink] = {}
        self._aborting: dict[str, asyncio.Future[None]] = {}
        self._outgoing: asyncio.Queue[ServeRequest] = asyncio.Queue()

    @property
    def num_sequences(self) -> int:
        return len(self._sinks)

    @property
    def num_unacknowledged_aborts(self) -> int:
        return len(self._aborting)

    def submit(self, message: SubmitSequence, sink: DecodeSink) -> None:
        """Start a sequence; its outputs go to `sink` until its last token, an error or `abort`.

        Raises:
            PeerUnavailableError: not connected at the moment; nothing was sent.
        """
        if not self.is_available:
            raise PeerUnavailableError(f"decode worker {self.worker_id} is not connected")
        self._sinks[message.request_id] = sink
        self._outgoing.put_nowait(ServeRequest(submit=message))

    def abort(self, request_id: str) -> None:
        """End a sequence; its sink hears nothing more. Harmless when it has ended already."""
        if self._sinks.pop(request_id, None) is None:
            return
        self._aborting[request_id] = asyncio.get_running_loop().create_future()
        self._outgoing.put_nowait(ServeRequest(abort=AbortSequence(request_id=request_id)))

    async def aborts_acknowledged(self) -> None:
        """Wait until the worker has answered every abort sent so far, or is gone."""
        for future in list(self._aborting.values()):
            await asyncio.shield(future)

    async def run(self) -> None:
        """Connect, pump, and connect again for as long as the worker is known."""
        backoff_s = MIN_BACKOFF_S
        while True:
            error: IsthmusError = PeerUnavailableError(f"decode worker {self.worker_id} is gone")
            try:
                async with open_channel(self.address) as channel:
                    async with asyncio.timeout(CONNECT_TIMEOUT_S):
                        await channel.channel_ready()
                    backoff_s = MIN_BACKOFF_S
                    await self._pump(channel)
            except aio.AioRpcError as rpc_error:
                error = PeerUnavailableError(
                    f"decode worker {self.worker_id}: {error_from_rpc(rpc_error)}"
                )
            except TimeoutError:
                pass
            finally:
                self.is_new = False
                self._lose(error)
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _pump(self, channel: aio.Channel) -> None:
        self._outgoing = asyncio.Queue()
        call = DecodeServiceStub(channel).Serve(_drain(self._outgoing))
        self._set_available(is_available=True)
        while isinstance(response := await call.read(), ServeResponse):
            for output in response.outputs:
                self._dispatch(output)

    def _dispatch(self, output: SequenceOutput) -> None:
        request_id = output.request_id
        sink = self._sinks.get(request_id)
        if sink is None:
            self._note_end_of_abort(request_id, output)
            return
        if _is_last(output):
            del self._sinks[request_id]
        try:
            sink.on_decode_output(request_id, output)
        except Exception:  # a bug in one sequence must not end the stream of all
            logger.exception("sequence failed request_id=%s", request_id)
            self.abort(request_id)
            sink.on_decode_lost(request_id, IsthmusError("internal error"))

    def _note_end_of_abort(self, request_id: str, output: SequenceOutput) -> None:
        """Tokens may still be on their way after an abort; its answer is the last of them."""
        if output.HasField("aborted"):
            self.num_freed_blocks += output.aborted.num_freed_blocks
            future = self._aborting.pop(request_id, None)
            if future is not None:
                future.set_result(None)

    def _lose(self, error: IsthmusError) -> None:
        sinks, self._sinks = self._sinks, {}
        aborting, self._aborting = self._aborting, {}
        self._set_available(is_available=False)
        for future in aborting.values():
            future.set_result(None)
        if sinks:
            logger.warning("lost %d sequences: %s", len(sinks), error)
        for request_id, sink in sinks.items():
            sink.on_decode_lost(request_id, error)

    def _set_available(self, *, is_available: bool) -> None:
        if is_available:
            self.is_new = False
        if self.is_available != is_available:
            self.is_available = is_available
            logger.info(
                "decode stream %s worker_id=%s",
                "connected" if is_available else "lost",
                self.worker_id,
            )
            self._on_change()


def _is_last(output: SequenceOutput) -> bool:
    event = output.WhichOneof("event")
    return event in ("error", "aborted") or bool(event == "token" and output.token.finish_reason)


async def _drain(queue: asyncio.Queue[ServeRequest]) -> AsyncIterator[ServeRequest]:
    while True:
        yield await queue.get()
