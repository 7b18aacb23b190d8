"""Collectives over torch.distributed's process groups: gloo between hosts, NCCL on CUDA."""

from collections.abc import Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import BroadcastOptions, ProcessGroup

_WIDENED = frozenset({torch.float16, torch.bfloat16})
FOREVER_S = 10.0 * 365 * 86400


class ProcessGroupCollectives:
    """Each call is one or two of the process group's own; bytes travel as uint8."""

    def __init__(
        self, name: str, group: ProcessGroup, rank: int, size: int, *, timeout_s: float
    ) -> None:
        self.name = name
        self._group = group
        self._rank = rank
        self._size = size
        self._timeout = timedelta(seconds=timeout_s)

    def all_reduce(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        wide = x.float() if x.dtype in _WIDENED else x
        self._group.allreduce([wide]).wait()
        if wide is not x:
            x.copy_(wide)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        if longest == 0:
            return
        padded = x
        if x.numel() < longest:
            padded = x.new_zeros(longest)
            padded[: x.numel()] = x
        parts = x.new_empty(self._size, longest)
        self._group.allgather(
            [[part.view(torch.uint8) for part in parts]], [padded.view(torch.uint8)]
        ).wait()
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            out[start : start + length] = part[:length]
            start += length

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        own = lengths[self._rank]
        parts = x.new_empty(self._size, own)
        self.all_to_all(x, parts.view(-1), lengths, [own] * self._size)
        wide = torch.float32 if x.dtype in _WIDENED else x.dtype
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part
        out.copy_(total)

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        item = x.element_size()
        self._group.alltoall_base(
            out.view(torch.uint8),
            x.view(torch.uint8),
            [length * item for length in receive_lengths],
            [length * item for length in send_lengths],
        ).wait()

    def broadcast(self, x: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        if x.numel() == 0:
            return
        options = BroadcastOptions()
        options.rootRank = source
        timeout = (
            self._timeout if timeout_s is None else timedelta(seconds=min(timeout_s, FOREVER_S))
        )
        options.timeout = timeout
        self._group.broadcast([x.view(torch.uint8)], options).wait(timeout)

    def send(self, x: torch.Tensor, to: int) -> None:
        if x.numel():
            self._group.send([x.view(torch.uint8)], to, 0).wait()

    def receive(self, x: torch.Tensor, source: int) -> None:
        if x.numel():
            self._group.recv([x.view(torch.uint8)], source, 0).wait()

    def barrier(self) -> None:
        self._group.barrier().wait()

    def close(self) -> None:
        self._group.shutdown()
