"""A decode worker's engine whose aborts wait until nobody writes to the blocks any more."""

from collections.abc import Sequence

from engine.request import Request
from engine.runtime.commands import (
    EngineStats,
    EventSink,
    RequestEngine,
    Reservation,
    SequenceMode,
)
from kv_transfer.receiver import KvReceiver


class FencedEngine:
    """Implements RequestEngine. Use it instead of the engine that `receiver` lends blocks of."""

    def __init__(self, engine: RequestEngine, receiver: KvReceiver) -> None:
        self._engine = engine
        self._receiver = receiver

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    def submit(self, request: Request, mode: SequenceMode, sink: EventSink) -> None:
        self._engine.submit(request, mode, sink)

    async def abort(self, request_id: str) -> int:
        num_reserved = await self._receiver.abort(request_id)
        return num_reserved + await self._engine.abort(request_id)

    async def release(self, request_id: str) -> int:
        return await self._engine.release(request_id)

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        return await self._engine.reserve(request_id, num_tokens, block_hashes)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        await self._engine.commit(request_id, first_token_id)

    async def cancel_reservation(self, request_id: str) -> int:
        return await self._engine.cancel_reservation(request_id)
