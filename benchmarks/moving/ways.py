"""The ways of moving blocks that are compared, seen from the sending process."""

import base64
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np

from benchmarks.moving.case import POOL_BYTES, Case, layout_of
from benchmarks.moving.far import EPOCH, LEASE_ID, LONG
from kv_transfer import stream
from kv_transfer.blocks import host_blocks, source_from
from kv_transfer.config import Checksums, DataPlane
from kv_transfer.convert import rank_offer_from
from kv_transfer.copying import Offsets
from kv_transfer.local_sending_rank import choose_writer
from kv_transfer.plane import WritePermit
from kv_transfer.reshard import Box, Transfer
from kv_transfer.sending_rank import Target
from kv_transfer.slot_ranges import SlotRanges
from kv_transfer.store.memory import StoreMemory
from protos.isthmus.v1 import kv_transfer_pb2 as pb

CONNECT_S = 5.0


class FarProcess:
    """Asks `benchmarks.moving.far`; a context manager."""

    def __init__(self, cores: Iterable[int]) -> None:
        """`cores`: where it may run."""
        self._cores = cores

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.moving.far"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        os.sched_setaffinity(self._process.pid, self._cores)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()

    def ask(self, do: str, **question: Any) -> dict[str, Any]:  # noqa: ANN401 - plain JSON
        """Its answer."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps({"do": do, **question}) + "\n")
        stdin.flush()
        while not (line := stdout.readline()).startswith("{"):  # libraries may talk, too
            assert line, "the far process has ended"
        answer: dict[str, Any] = json.loads(line)
        return answer

    @property
    def cpu_s(self) -> float:
        return float(self.ask("cpu")["cpu_s"])


Move = Callable[[Case, Offsets, Offsets], Callable[[], object]]
"""Get ready to move a case's blocks from these places to those; what it returns moves them."""


class Way(Protocol):
    def open(self, far: FarProcess, block_bytes: int, stack: ExitStack) -> Move:
        """Ready for blocks of this size; what is opened is closed with `stack`."""


class MemoryCopy:
    """As many bytes in one piece, inside one process: what memory allows one thread."""

    def open(self, far: FarProcess, block_bytes: int, stack: ExitStack) -> Move:
        source, target = (np.ones(POOL_BYTES, np.uint8) for _ in range(2))
        places = _Places()

        def ready(case: Case, here: Offsets, there: Offsets) -> Callable[[], object]:
            some = places.next(case)
            return partial(np.copyto, target[some], source[some])

        return ready


class PlainSocket:
    """As many bytes of the same pools in one piece: sendall here, recv_into there, a byte back.

    With the congestion control that ours asks for: which one a system has by default is no merit.
    """

    def open(self, far: FarProcess, block_bytes: int, stack: ExitStack) -> Move:
        pool = stack.enter_context(_pool(block_bytes))
        source = pool.host_bytes
        address = ("127.0.0.1", far.ask("socket", block_bytes=block_bytes)["port"])
        sock = stack.enter_context(stream.connect(address, timeout_s=CONNECT_S))
        sock.settimeout(None)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        places = _Places()

        def ready(case: Case, here: Offsets, there: Offsets) -> Callable[[], object]:
            buffers = (case.num_bytes.to_bytes(8), source[places.next(case)])

            def move() -> None:
                for buffer in buffers:
                    sock.sendall(buffer)
                sock.recv(1)

            return move

        return ready


def _pool(block_bytes: int) -> StoreMemory:
    return StoreMemory(layout_of(block_bytes), POOL_BYTES // block_bytes)


class _Places:
    """One piece of the pool after the other."""

    def __init__(self) -> None:
        self._first = 0

    def next(self, case: Case) -> slice:
        first = self._first if self._first + case.num_bytes <= POOL_BYTES else 0
        self._first = first + case.num_bytes
        return slice(first, self._first)


class Plane:
    """One of ours, as a sending rank writes through it."""

    def __init__(self, data_plane: DataPlane, checksums: Checksums = Checksums.NETWORK) -> None:
        self._data_plane = data_plane
        self._checksums = checksums

    def open(self, far: FarProcess, block_bytes: int, stack: ExitStack) -> Move:
        layout = layout_of(block_bytes)
        pool = stack.enter_context(_pool(block_bytes))
        rank = pb.KvRank.FromString(
            base64.b64decode(
                far.ask("plane", block_bytes=block_bytes, data_plane=self._data_plane)["rank"]
            )
        )
        box = Box(0, layout.num_layers, 0, layout.num_kv_heads)
        transfers = (Transfer(0, 0, box, box),)
        target = Target(
            "far", rank_offer_from(rank), layout, pool.num_blocks, "127.0.0.1:1", transfers
        )
        config = replace(LONG, data_plane=self._data_plane, checksums=self._checksums)
        host = host_blocks(pool)
        writer = choose_writer(target, config, host).writer
        stack.callback(writer.close)
        permit = WritePermit(LEASE_ID, EPOCH, lambda: 0.0, 1.0)

        def ready(case: Case, here: Offsets, there: Offsets) -> Callable[[], object]:
            zeros = np.zeros_like(here)
            slots = np.full_like(here, layout.block_size_tokens)
            parts = SlotRanges(np.stack([here, zeros, there, zeros, slots], axis=1))
            return lambda: writer.write(permit, source_from(pool, host, parts), parts, transfers)

        return ready
