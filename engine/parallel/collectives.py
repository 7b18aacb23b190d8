"""What the ranks of one axis can do together; implementations differ by how bytes travel."""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.config import CollectivesConfig

__all__ = ["Collectives", "CollectivesConfig", "shift_lengths"]


class Collectives(Protocol):
    """Exchange among the ranks of one group; `rank` arguments are positions in the group.

    Order is a contract: every rank of the group makes the same calls in the same order, from one
    thread, except that send and receive concern two ranks only. Tensors are contiguous and flat;
    lengths are elements. After an error the group is of no use any more.

    Raises (every call):
        RankDeadError: the process of a rank is gone.
        CollectiveTimeoutError: a rank did not come within the time-out.
        CollectiveAbortedError: a rank called `abort`.
    """

    name: str
    """How bytes travel: "shm", "gloo", "nccl"."""

    is_in_background: bool
    """What has begun goes on while the calling thread computes, and takes long enough that this
    is worth it; the same on all ranks."""

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sum over the ranks, in place: the same bits on every rank.

        float16 and bfloat16 are summed in float32 and rounded once.
        """

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], None]:
        """Start `all_reduce`; `x` has the sum once the function returned was called.

        Until then `x` must not be touched. Other calls may come in between, the same on all ranks;
        several that were begun are finished in the order they were begun in. Where
        `is_in_background` is false this does all of it.
        """

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        """Start to send to the rank after, round the group, and to receive from the rank before.

        `out` is as large as what that rank sends, and filled once the function returned was called;
        `x` must not be changed until then. Order as of `begin_all_reduce`.
        """

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        """Fill `out` with every rank's `x`, in rank order; rank r's has lengths[r] elements."""

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        """Fill `out` with this rank's part of the sum of `x`; rank r's has lengths[r] elements."""

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        """Send the r-th part of `x` to rank r; parts received stand in `out` in rank order."""

    def broadcast(self, x: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        """Copy `x` of rank `source` to the others'; `timeout_s` in place of the configured one.

        With `math.inf` the wait lasts as long as all ranks live.
        """

    def send(self, x: torch.Tensor, to: int) -> None:
        """Send to one rank, which calls `receive`; `x` must not be changed afterwards.

        Returns without waiting for it (NCCL: the stream waits). A send that fails raises here or
        in a later call.
        """

    def receive(self, x: torch.Tensor, source: int) -> None:
        """Fill `x` with what rank `source` sends; both sides must agree on the size."""

    def barrier(self) -> None:
        """Return when every rank has come here."""

    def close(self) -> None:
        """Give up buffers and connections; the other ranks need not be there any more."""


def shift_lengths(
    x: torch.Tensor, out: torch.Tensor, rank: int, size: int
) -> tuple[list[int], list[int]]:
    """Arguments of `Collectives.all_to_all` that make it a shift."""
    sends, receives = [0] * size, [0] * size
    sends[(rank + 1) % size], receives[(rank - 1) % size] = x.numel(), out.numel()
    return sends, receives
