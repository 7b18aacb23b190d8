"""This rank's place on each parallel axis, passed explicitly to whatever needs it."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from engine.parallel.collectives import Collectives
from engine.parallel.kv_exchange import KvExchange
from engine.parallel.layout import Axis, ParallelLayout
from engine.parallel.traffic import Traffic

_LENGTH_BYTES = 8

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """One axis: this rank among `size` ranks that share it.

    With one rank every call is free. Every rank of the axis must make the same calls in the same
    order; what they raise is in `Collectives`.
    """

    rank: int = 0
    size: int = 1
    collectives: Collectives | None = None
    """How the ranks talk; None where there is one, or where nothing but the place is wanted."""
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the axis, in place where it is contiguous; the same bits on every rank."""
        if self.size == 1:
            return x
        x = x.contiguous()
        self._timed(x.nbytes, lambda to: to.all_reduce(x.view(-1)))
        return x

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start `all_reduce`; the function returned waits and gives the sum.

        What the calling thread does in between hides the exchange, if the axis
        `is_in_background`; `x` must not be touched meanwhile. Order is that of
        `Collectives.begin_all_reduce`. Only what is waited for counts as traffic's time.
        """
        if self.size == 1:
            return lambda: x
        x = x.contiguous()
        finish = self._timed(x.nbytes, lambda to: to.begin_all_reduce(x.view(-1)))

        def total() -> torch.Tensor:
            start_s = time.perf_counter()
            try:
                finish()
            finally:
                self.traffic.add_wait(time.perf_counter() - start_s)
            return x

        return total

    @property
    def is_in_background(self) -> bool:
        """Sums that were begun travel while this rank computes."""
        return self.size > 1 and self.collectives is not None and self.collectives.is_in_background

    def all_gather(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Concatenate each rank's `x` along `dim`, in rank order; every rank gets it.

        Args:
            x: alike on all ranks but in `dim`.
            dim: counted as torch does.
            sizes: each rank's length of `dim`, where they differ.
        """
        if self.size == 1:
            return x
        sizes = sizes or [x.shape[dim]] * self.size
        assert sizes[self.rank] == x.shape[dim], f"{x.shape[dim]} in dim {dim}, said {sizes}"
        front = x.movedim(dim, 0).contiguous()
        row_length = math.prod(front.shape[1:])
        out = front.new_empty((sum(sizes), *front.shape[1:]))
        lengths = [size * row_length for size in sizes]
        self._timed(out.nbytes, lambda to: to.all_gather(front.view(-1), out.view(-1), lengths))
        return out.movedim(0, dim).contiguous()

    def reduce_scatter(
        self, x: torch.Tensor, dim: int = -1, sizes: Sequence[int] | None = None
    ) -> torch.Tensor:
        """Sum `x` over the axis and return this rank's share of `dim`.

        Args:
            x: alike on all ranks.
            dim: counted as torch does.
            sizes: each rank's share of `dim`; even by default.
        """
        if self.size == 1:
            return x
        sizes = sizes or [self.shard_size(x.shape[dim], f"dim {dim}")] * self.size
        assert sum(sizes) == x.shape[dim], f"{x.shape[dim]} in dim {dim}, said {sizes}"
        front = x.movedim(dim, 0).contiguous()
        row_length = math.prod(front.shape[1:])
        out = front.new_empty((sizes[self.rank], *front.shape[1:]))
        lengths = [size * row_length for size in sizes]
        self._timed(
            front.nbytes, lambda to: to.reduce_scatter(front.view(-1), out.view(-1), lengths)
        )
        return out.movedim(0, dim).contiguous()

    def all_to_all(
        self, x: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> torch.Tensor:
        """Send rows [sum(send_sizes[:r]), + send_sizes[r]) to rank r; rows come in rank order.

        Args:
            x: rows along the first dim.
            send_sizes: rows for each rank.
            receive_sizes: rows from each rank, which they must be about to send.
        """
        assert sum(send_sizes) == x.shape[0], f"{x.shape[0]} rows, said {send_sizes}"
        if self.size == 1:
            return x
        x = x.contiguous()
        out = x.new_empty((sum(receive_sizes), *x.shape[1:]))
        row_length = math.prod(x.shape[1:])
        sends = [size * row_length for size in send_sizes]
        receives = [size * row_length for size in receive_sizes]
        self._timed(
            max(x.nbytes, out.nbytes),
            lambda to: to.all_to_all(x.view(-1), out.view(-1), sends, receives),
        )
        return out

    def broadcast(
        self, x: torch.Tensor, source: int = 0, *, timeout_s: float | None = None
    ) -> torch.Tensor:
        """Copy rank `source`'s contiguous `x` into the others', in place.

        `math.inf` as time-out waits as long as all ranks live: for followers with nothing to do.
        """
        if self.size > 1:
            flat = x.view(-1)
            self._timed(x.nbytes, lambda to: to.broadcast(flat, source, timeout_s=timeout_s))
        return x

    def broadcast_bytes(
        self,
        data: bytes | None,
        source: int = 0,
        *,
        max_bytes: int,
        timeout_s: float | None = None,
    ) -> bytes:
        """Every rank returns what rank `source` passed as `data`; the others pass None.

        Raises:
            ValueError: more than `max_bytes`, on every rank.
        """
        assert (self.rank == source) is (data is not None), "the source alone passes data"
        if self.size == 1:
            return data or b""
        length = 0 if data is None else len(data)
        head = bytearray(length.to_bytes(_LENGTH_BYTES, "little"))
        self.broadcast(torch.frombuffer(head, dtype=torch.uint8), source, timeout_s=timeout_s)
        num_bytes = int.from_bytes(head, "little")
        if num_bytes > max_bytes:
            raise ValueError(f"{num_bytes} bytes were to be broadcast, {max_bytes} are allowed")
        if num_bytes == 0:
            return b""
        body = bytearray(data if data is not None else num_bytes)
        self.broadcast(torch.frombuffer(body, dtype=torch.uint8), source)
        return bytes(body)

    def send(self, x: torch.Tensor, to: int) -> None:
        """Send to rank `to` of the axis, which calls `receive` with a tensor of this size.

        Does not wait for it; `x` must not be changed any more.
        """
        flat = x.contiguous().view(-1)
        self._timed(x.nbytes, lambda collectives: collectives.send(flat, to))

    def receive(self, x: torch.Tensor, source: int) -> torch.Tensor:
        """Fill contiguous `x` with what rank `source` of the axis sends."""
        flat = x.view(-1)
        self._timed(x.nbytes, lambda collectives: collectives.receive(flat, source))
        return x

    def begin_shift(self, x: torch.Tensor, num_rows: int) -> Callable[[], torch.Tensor]:
        """Send to the rank after; the function returned waits for what the rank before sends.

        What the calling thread does in between hides the exchange, if the axis
        `is_in_background`; `x` must not be changed meanwhile. Order is that of
        `Collectives.begin_all_reduce`. Only what is waited for counts as traffic's time.

        Args:
            x: rows along the first dim.
            num_rows: what comes has so many, and is else like `x`.
        """
        x = x.contiguous()
        out = x.new_empty((num_rows, *x.shape[1:]))
        num_bytes = max(x.nbytes, out.nbytes)
        finish = self._timed(num_bytes, lambda to: to.begin_shift(x.view(-1), out.view(-1)))

        def shifted() -> torch.Tensor:
            start_s = time.perf_counter()
            try:
                finish()
            finally:
                self.traffic.add_wait(time.perf_counter() - start_s)
            return out

        return shifted

    def barrier(self) -> None:
        """Return when every rank of the axis has come here."""
        if self.size > 1:
            self._timed(0, lambda to: to.barrier())

    def shard_size(self, full_size: int, what: str) -> int:
        """This rank's even share of `full_size`."""
        if full_size % self.size:
            raise ValueError(f"{what} ({full_size}) must divide by the axis size ({self.size})")
        return full_size // self.size

    def _timed(self, num_bytes: int, call: Callable[[Collectives], Result]) -> Result:
        assert self.collectives is not None, "this axis was made without collectives"
        start_s = time.perf_counter()
        try:
            return call(self.collectives)
        finally:
            self.traffic.add(time.perf_counter() - start_s, num_bytes)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelAxes:
    """All axes of one rank."""

    tp: AxisGroup = AxisGroup()
    """Tensor: heads and feed-forward features are split."""
    pp: AxisGroup = AxisGroup()
    """Pipeline: layers are split."""
    ep: AxisGroup = AxisGroup()
    """Expert: experts are split."""
    sp: AxisGroup = AxisGroup()
    """Sequence: tokens of a long prompt are split."""
    dp: AxisGroup = AxisGroup()
    """Data: requests are split."""
    expert_tp: AxisGroup = AxisGroup()
    """Ranks that hold the same experts, split by features; tp where ep is 1."""
    world: AxisGroup = AxisGroup()
    """All ranks of the worker, for step plans; always in host memory."""
    interleave: int = 1
    """Layer ranges on each rank of the pipeline."""
    is_for_prompts: bool = False
    """Stages cost alike for prompts; else for tokens that are decoded."""
    kv_exchange: KvExchange | None = None
    """Of split steps, where it is not to be chosen by size."""

    @classmethod
    def single(cls) -> "ParallelAxes":
        """One rank that holds everything."""
        return cls()

    @classmethod
    def from_layout(
        cls,
        layout: ParallelLayout,
        rank: int,
        collectives: Mapping[Axis, Collectives] | None = None,
        traffic: Traffic | None = None,
    ) -> "ParallelAxes":
        """The axes of global `rank`.

        Without collectives they only tell places: enough to plan, or to load one rank's weights.
        """
        if not 0 <= rank < layout.num_ranks:
            raise ValueError(f"rank must be in [0, {layout.num_ranks}) for {layout}, got {rank}")
        traffic = traffic or Traffic()
        groups = {
            axis.value: AxisGroup(
                rank=layout.index(axis, rank),
                size=layout.size(axis),
                collectives=(collectives or {}).get(axis),
                traffic=traffic,
            )
            for axis in Axis
        }
        return cls(**groups, interleave=layout.interleave, is_for_prompts=False, kv_exchange=None)
