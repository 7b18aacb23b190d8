"""Runs a function on several ranks, each a process of its own, and collects what they return.

    def square_of_rank(group: RankGroup, offset: int) -> torch.Tensor: ...  # at module level

    results = run_ranks("tp=2,pp=2", square_of_rank, 7)

Processes are forked from a server that has imported torch already, so a rank starts in a fraction
of a second. Results come back as msgpack: numbers, text, bytes, lists, dicts, tensors, arrays.
"""

import faulthandler
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from ctypes import CDLL
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Self

import msgspec
import numpy as np
import torch
from torch._C._distributed_c10d import TCPStore

from engine.parallel import CollectivesConfig, ParallelLayout, RankEnvironment, join_group

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

TIMEOUT_S = 60.0
_PRELOAD = ["pytest", "tests.distributed.ranks", "engine.models.build", "engine.runtime.build"]
_TENSOR, _ARRAY = 1, 2
_PR_SET_PDEATHSIG = 1

RankFunction = Callable[..., Any]


class RanksFailedError(AssertionError):
    """A rank raised, died or took too long; the text has its traceback."""


def run_ranks(
    layout: str | int | ParallelLayout,
    function: RankFunction,
    *arguments: Any,
    config: CollectivesConfig | None = None,
    timeout_s: float = TIMEOUT_S,
) -> list[Any]:
    """Call `function(group, *arguments)` on every rank; returns what each returned, by rank.

    Args:
        layout: as `ParallelLayout.parse` reads it; a number is that many tp ranks.
        function: at module level, so that the processes find it by name.
        arguments: anything that multiprocessing can send.
        config: of the collectives.
        timeout_s: for everything; then all ranks are killed.

    Raises:
        RanksFailedError: some rank failed; all are dead by then.
    """
    with RankProcesses(layout, function, *arguments, config=config) as ranks:
        return ranks.results(timeout_s=timeout_s)


class RankProcesses:
    """Ranks that run; for tests that stop or kill some of them. None outlives the context."""

    def __init__(
        self,
        layout: str | int | ParallelLayout,
        function: RankFunction,
        *arguments: Any,
        config: CollectivesConfig | None = None,
    ) -> None:
        if isinstance(layout, int):
            layout = ParallelLayout(tp=layout)
        elif isinstance(layout, str):
            layout = ParallelLayout.parse(layout)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._traces = tempfile.TemporaryDirectory()
        self._results: dict[int, Any] = {}
        self._connections: list[Connection] = []
        self._processes: list[BaseProcess] = []
        for rank in range(layout.num_ranks):
            environment = RankEnvironment(
                rank=rank,
                world_size=layout.num_ranks,
                local_rank=rank,
                master_address="127.0.0.1",
                master_port=self._store.port,
                is_store_elsewhere=True,
            )
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run,
                args=(sender, self._trace(rank), layout, environment, config, function, arguments),
                name=f"rank {rank}",
                daemon=True,
            )
            self._connections.append(receiver)
            self._processes.append(process)
            process.start()
            sender.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            process.close()
            connection.close()
        self._traces.cleanup()

    @property
    def pids(self) -> list[int]:
        return [process.pid or 0 for process in self._processes]

    def kill(self, rank: int, signal_number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank."""
        os.kill(self.pids[rank], signal_number)

    def results(
        self, ranks: Iterable[int] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> list[Any]:
        """What `ranks` returned, all by default; others may die or hang meanwhile.

        Raises:
            RanksFailedError: one of them raised, died or took too long.
        """
        wanted = list(range(len(self._processes)) if ranks is None else ranks)
        deadline_s = time.monotonic() + timeout_s
        while missing := [rank for rank in wanted if rank not in self._results]:
            by_connection = {self._connections[rank]: rank for rank in missing}
            ready = wait(list(by_connection), max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise RanksFailedError(self._told_where(missing, timeout_s))
            for connection in ready:
                rank = by_connection[connection]  # type: ignore[index]
                self._results[rank] = self._received(rank)
        return [self._results[rank] for rank in wanted]

    def _received(self, rank: int) -> Any:
        try:
            is_result, data = _decode(self._connections[rank].recv_bytes())
        except EOFError:
            process = self._processes[rank]
            process.join(1)
            raise RanksFailedError(f"rank {rank} died, exit code {process.exitcode}") from None
        if not is_result:
            raise RanksFailedError(f"rank {rank} raised\n{data}")
        return data

    def _trace(self, rank: int) -> str:
        return f"{self._traces.name}/{rank}"

    def _told_where(self, ranks: Iterable[int], timeout_s: float) -> str:
        """The stacks of ranks that take too long."""
        lines = [f"ranks {list(ranks)} took more than {timeout_s} s"]
        for rank in ranks:
            path = self._trace(rank)
            os.kill(self.pids[rank], signal.SIGUSR1)
            end_s = time.monotonic() + 1
            while time.monotonic() < end_s and not (
                os.path.exists(path) and os.path.getsize(path)  # noqa: PTH110, PTH202
            ):
                time.sleep(0.01)
            with open(path) as file:  # noqa: PTH123
                lines.append(f"rank {rank}:\n{file.read() or 'does not answer'}")
        return "\n".join(lines)


def _run(
    connection: Connection,
    trace_path: str,
    layout: ParallelLayout,
    environment: RankEnvironment,
    config: CollectivesConfig | None,
    function: RankFunction,
    arguments: tuple[Any, ...],
) -> None:
    CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # goes when the fork server goes
    with open(trace_path, "w") as trace:  # noqa: PTH123
        faulthandler.register(signal.SIGUSR1, trace)
        torch.set_num_threads(1)
        try:
            with join_group(layout, environment, config=config) as group:
                answer = _encode((True, function(group, *arguments)))
        except BaseException:  # noqa: BLE001
            answer = _encode((False, traceback.format_exc()))
        connection.send_bytes(answer)
        faulthandler.unregister(signal.SIGUSR1)


def _encode(value: Any) -> bytes:
    return msgspec.msgpack.encode(value, enc_hook=_extension)


def _decode(data: bytes) -> Any:
    return msgspec.msgpack.decode(data, ext_hook=_value)


def _extension(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        raw = value.detach().cpu().contiguous()
        name = str(raw.dtype).removeprefix("torch.")
        data = raw.view(-1).view(torch.uint8).numpy().tobytes()
        return msgspec.msgpack.Ext(_TENSOR, msgspec.msgpack.encode([name, list(raw.shape), data]))
    if isinstance(value, np.ndarray):
        content = [value.dtype.str, list(value.shape), value.tobytes()]
        return msgspec.msgpack.Ext(_ARRAY, msgspec.msgpack.encode(content))
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"a rank cannot return {type(value).__name__}")


def _value(code: int, data: memoryview) -> Any:
    name, shape, content = msgspec.msgpack.decode(data)
    if code == _ARRAY:
        return np.frombuffer(content, np.dtype(name)).reshape(shape)
    dtype = getattr(torch, name)
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).view(shape)
