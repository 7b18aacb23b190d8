"""Collectives among ranks of one host, through memory that they all map (see collectives.c)."""

import ctypes
import math
from collections.abc import Callable, Sequence

import torch

from engine.parallel.collectives import CollectivesConfig, shift_lengths
from engine.parallel.host_board import HostBoard
from engine.parallel.native_group import Answer, NativeGroupLibrary
from engine.parallel.outbox import Outbox

_DTYPE_CODE = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.int32: 4,
    torch.int64: 5,
}
_BRIEF_BYTES = 64 * 1024
"""Calls that move more let the interpreter lock go at once."""
_LINE_BYTES = 64
_PAGE_BYTES = 4096
_OPERATIONS = (
    "nothing",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "barrier",
)


def buffer_bytes(config: CollectivesConfig, size: int) -> int:
    """Bytes of each of a rank's two slots: enough for a part for every rank, whole lines."""
    return math.ceil(max(config.collective_buffer_bytes, 1024 * size) / _LINE_BYTES) * _LINE_BYTES


def group_bytes(library: NativeGroupLibrary, config: CollectivesConfig, size: int) -> int:
    """Shared memory that a group takes, in whole pages."""
    num_bytes: int = library.group_bytes(size, buffer_bytes(config, size), config.mailbox_bytes)
    return math.ceil(num_bytes / _PAGE_BYTES) * _PAGE_BYTES


class SharedMemoryCollectives:
    """One group's share of the host's memory file."""

    name = "shm"
    is_in_background = False

    def __init__(
        self,
        library: NativeGroupLibrary,
        board: HostBoard,
        address: int,
        ranks: Sequence[int],
        rank: int,
        *,
        title: str,
        config: CollectivesConfig,
        spin_s: float,
    ) -> None:
        """Open the group of global `ranks` at `address`; `title` names it in errors."""
        self._library = library
        self._board = board
        self._title = title
        self._ranks = tuple(ranks)
        self._rank = self._ranks.index(rank)
        self._timeout_ns = round(config.collective_timeout_s * 1e9)
        size = len(ranks)
        self._lengths = ctypes.c_int64 * size
        places = (ctypes.c_int32 * size)(*(board.place(other) for other in ranks))
        pidfds = (ctypes.c_int32 * size)(*(board.pidfds.get(other, -1) for other in ranks))
        # What a call has done so far stands in its handle: sends that wait have one of their own.
        self._handle, self._sending_handle = (
            library.group_open(
                board.address,
                address,
                self._rank,
                size,
                buffer_bytes(config, size),
                config.mailbox_bytes,
                round(spin_s * 1e9),
                places,
                pidfds,
            )
            for _ in range(2)
        )
        if not self._handle or not self._sending_handle:
            raise MemoryError("no memory for a rank group")
        self._outbox = Outbox(self._try_send, name=f"send-{title}")

    def all_reduce(self, x: torch.Tensor) -> None:
        self._call("all_reduce", x.nbytes, _code(x), x.data_ptr(), x.nbytes)

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], None]:
        self.all_reduce(x)
        return _nothing

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        num_bytes = self._bytes(lengths, x)
        self._call("all_gather", out.nbytes, x.data_ptr(), out.data_ptr(), num_bytes)

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        num_bytes = self._bytes(lengths, x)
        self._call("reduce_scatter", x.nbytes, _code(x), x.data_ptr(), out.data_ptr(), num_bytes)

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        self._call(
            "all_to_all",
            max(x.nbytes, out.nbytes),
            x.data_ptr(),
            out.data_ptr(),
            self._bytes(send_lengths, x),
            self._bytes(receive_lengths, x),
        )

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        self.all_to_all(x, out, *shift_lengths(x, out, self._rank, len(self._ranks)))
        return _nothing

    def broadcast(self, x: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        timeout_ns = self._timeout_ns
        if timeout_s is not None:
            timeout_ns = -1 if timeout_s == math.inf else round(timeout_s * 1e9)
        self._call("broadcast", x.nbytes, x.data_ptr(), x.nbytes, source, timeout_ns=timeout_ns)

    def send(self, x: torch.Tensor, to: int) -> None:
        self._outbox.send(x, to)

    def receive(self, x: torch.Tensor, source: int) -> None:
        self._call("receive", x.nbytes, x.data_ptr(), x.nbytes, source)

    def barrier(self) -> None:
        self._call("barrier", 0)

    def close(self) -> None:
        self._outbox.close()
        for handle in filter(None, (self._handle, self._sending_handle)):
            self._library.group_close(handle)
        self._handle = self._sending_handle = None

    def _try_send(self, x: torch.Tensor, to: int) -> bool:
        assert self._sending_handle, "send after close"
        arguments = (x.data_ptr(), x.nbytes, to, self._timeout_ns, 1)
        answer = self._library.brief["send"](self._sending_handle, *arguments)
        if answer not in (Answer.DONE, Answer.AGAIN):
            self._fail(answer, "send", x.nbytes)
        return answer == Answer.DONE

    def _bytes(self, lengths: Sequence[int], x: torch.Tensor) -> "ctypes.Array[ctypes.c_int64]":
        item = x.element_size()
        return self._lengths(*(length * item for length in lengths))

    def _call(
        self, name: str, num_bytes: int, *arguments: object, timeout_ns: int | None = None
    ) -> None:
        if timeout_ns is None:
            timeout_ns = self._timeout_ns
        assert self._handle, "collective after close"
        answer = Answer.AGAIN.value
        if num_bytes <= _BRIEF_BYTES:
            answer = self._library.brief[name](self._handle, *arguments, timeout_ns, 1)
        if answer == Answer.AGAIN:
            answer = self._library.waiting[name](self._handle, *arguments, timeout_ns, 0)
        if answer != Answer.DONE:
            self._fail(answer, name, num_bytes)

    def _fail(self, answer: int, name: str, num_bytes: int) -> None:
        operation = f"{self._title} {name}"
        if answer == Answer.MISMATCH:
            there_bytes = ctypes.c_uint64()
            there = self._library.group_mismatch(self._handle, ctypes.byref(there_bytes))
            rank = self._ranks[there >> 32]
            there_name = _OPERATIONS[there & 0xFF]
            if name == "receive" or name == there_name == "all_to_all":
                reason = f"{operation}: rank {rank} sends another number of bytes than expected"
            else:
                reason = (
                    f"{operation} of {num_bytes} bytes met {there_name} of "
                    f"{there_bytes.value} bytes on rank {rank}"
                )
            self._board.abort(reason)
        verdict = self._board.verdict()
        assert verdict is not None, f"{operation} failed without a verdict"
        raise verdict.error(operation, self._timeout_ns / 1e9)


def _nothing() -> None:
    """Is left to do."""


def _code(x: torch.Tensor) -> int:
    code = _DTYPE_CODE.get(x.dtype)
    if code is None:
        raise TypeError(f"{x.dtype} cannot be summed over ranks")
    return code
