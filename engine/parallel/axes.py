"""This rank's place on each parallel axis, passed explicitly to whatever needs it."""

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class AxisGroup:
    """One axis: this rank among `size` ranks that share it."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"rank must be in [0, {self.size}), got {self.rank}")

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum `x` over the axis, in place; free when the axis has one rank."""
        if self.size > 1:
            dist.all_reduce(x, group=self.process_group)
        return x

    def all_gather_last_dim(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenate each rank's `x` along the last dim, in rank order; every rank gets it."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.process_group)
        return torch.cat(parts, dim=-1)

    def shard_size(self, full_size: int, what: str) -> int:
        """This rank's even share of `full_size`."""
        if full_size % self.size:
            raise ValueError(f"{what} ({full_size}) must divide by the axis size ({self.size})")
        return full_size // self.size


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

    @classmethod
    def single(cls) -> "ParallelAxes":
        """One rank that holds everything."""
        return cls()
