"""An engine whose prompts may come out of a store in part: implements RequestEngine."""

import asyncio
from collections.abc import Callable, Sequence

from engine.errors import DuplicateRequestError, IsthmusError
from engine.request import Request
from engine.runtime.commands import (
    EngineStats,
    ErrorEvent,
    EventSink,
    Reservation,
    SequenceMode,
)
from engine.runtime.engine_thread import EngineThread
from engine.scheduling.block_hash import block_hashes
from kv_transfer.prefix.fetcher import PrefixFetcher
from kv_transfer.together import to_its_end


class FetchingEngine:
    """Fetches first, then submits to `engine`. Loop only."""

    def __init__(
        self,
        engine: EngineThread,
        fetcher: PrefixFetcher,
        *,
        block_size_tokens: int,
        hash_salt_of: Callable[[int], int],
    ) -> None:
        """`hash_salt_of` prompt lengths is the engine's."""
        self._engine = engine
        self._fetcher = fetcher
        self._block_size_tokens = block_size_tokens
        self._hash_salt_of = hash_salt_of
        self._fetching: dict[str, asyncio.Task[None]] = {}

    @property
    def stats(self) -> EngineStats:
        return self._engine.stats

    def submit(self, request: Request, mode: SequenceMode, sink: EventSink) -> None:
        if request.request_id in self._fetching:
            raise DuplicateRequestError(f"request {request.request_id} is running")
        hashes = self._hashes(request) if mode is not SequenceMode.DECODE else ()
        if not self._fetcher.is_of_use(hashes):
            self._engine.submit(request, mode, sink)
            return
        self._engine.check_submit(request, mode)
        task = asyncio.get_running_loop().create_task(
            self._fetch_and_submit(request, mode, sink, hashes),
            name=f"fetch-{request.request_id}",
        )
        self._fetching[request.request_id] = task
        task.add_done_callback(lambda _: self._fetching.pop(request.request_id))

    async def abort(self, request_id: str) -> int:
        await self._stop_fetch(request_id)
        return await self._engine.abort(request_id)

    async def release(self, request_id: str) -> int:
        await self._stop_fetch(request_id)
        return await self._engine.release(request_id)

    async def reserve(
        self, request_id: str, num_tokens: int, block_hashes: Sequence[bytes]
    ) -> Reservation:
        return await self._engine.reserve(request_id, num_tokens, block_hashes)

    async def commit(self, request_id: str, first_token_id: int) -> None:
        await self._engine.commit(request_id, first_token_id)

    async def cancel_reservation(self, request_id: str) -> int:
        return await self._engine.cancel_reservation(request_id)

    async def aclose(self) -> None:
        """End every fetch; their requests are never submitted."""
        for request_id in list(self._fetching):
            await self._stop_fetch(request_id)

    def _hashes(self, request: Request) -> Sequence[bytes]:
        """Of all blocks but the one with the last token, which is computed in any case."""
        token_ids = [*request.prompt_token_ids, *request.output_token_ids]
        salt = self._hash_salt_of(len(request.prompt_token_ids))
        return block_hashes(token_ids[:-1], self._block_size_tokens, salt=salt)

    async def _fetch_and_submit(
        self, request: Request, mode: SequenceMode, sink: EventSink, hashes: Sequence[bytes]
    ) -> None:
        sink.put([await self._fetcher.fetch(request.request_id, hashes)])
        try:
            self._engine.submit(request, mode, sink)
        except IsthmusError as error:
            sink.put([ErrorEvent(request.request_id, error)])

    async def _stop_fetch(self, request_id: str) -> None:
        """Returns once the blocks of the fetch are free; its id is taken until then."""
        if (task := self._fetching.get(request_id)) is not None:
            task.cancel()
            await to_its_end(_end_of(task))


async def _end_of(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])
