"""A TCP relay on the way of the KV bytes that cuts, stalls or damages some of the transfers."""

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import StrEnum

CHUNK_BYTES = 1 << 16


class RelayFault(StrEnum):
    CUT = "cut"
    """The connection breaks at a random byte."""
    STALL = "stall"
    """Nothing moves from a random byte on, for longer than the sender waits."""
    FLIP = "flip"
    """One bit arrives changed."""


class FaultyRelay:
    """Counts transfers (what a sender says between two answers) and the faults that it made."""

    def __init__(self, target: tuple[str, int], *, share: float, stall_s: float, seed: int) -> None:
        self.port = 0
        self.num_transfers = 0
        self.faults: Counter[RelayFault] = Counter()
        self._target = target
        self._share = share
        self._stall_s = stall_s
        self._random = random.Random(seed)
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()
            for pump in self._pumps:
                pump.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._pumps.add(task)
        try:
            other_reader, other_writer = await asyncio.open_connection(*self._target)
            transfer = _Transfer()
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._carry(reader, other_writer, other_reader, writer, transfer)
            other_writer.close()
        finally:
            writer.close()
            self._pumps.discard(task)

    async def _carry(
        self,
        up_reader: asyncio.StreamReader,
        up_writer: asyncio.StreamWriter,
        down_reader: asyncio.StreamReader,
        down_writer: asyncio.StreamWriter,
        transfer: "_Transfer",
    ) -> None:
        """Both ways, until one of them has ended."""
        ways = [
            asyncio.ensure_future(self._carry_kv(up_reader, up_writer, transfer)),
            asyncio.ensure_future(_carry_answers(down_reader, down_writer, transfer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry_kv(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transfer: "_Transfer"
    ) -> None:
        while data := bytearray(await reader.read(CHUNK_BYTES)):
            if transfer.is_new:
                transfer.is_new = False
                self.num_transfers += 1
                if self._random.random() < self._share:
                    await self._spoil(data, writer)
            writer.write(data)
            await writer.drain()

    async def _spoil(self, data: bytearray, writer: asyncio.StreamWriter) -> None:
        """Do harm from a random byte of `data` on; leaves what is to be sent in it."""
        fault = self._random.choice(list(RelayFault))
        self.faults[fault] += 1
        place = self._random.randrange(len(data))
        if fault is RelayFault.FLIP:
            data[place] ^= 1 << self._random.randrange(8)
            return
        writer.write(data[:place])
        del data[:place]
        await writer.drain()
        if fault is RelayFault.CUT:
            raise ConnectionResetError("cut")
        await asyncio.sleep(self._stall_s)


class _Transfer:
    is_new = True


async def _carry_answers(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, transfer: _Transfer
) -> None:
    while data := await reader.read(CHUNK_BYTES):
        transfer.is_new = True
        writer.write(data)
        await writer.drain()
