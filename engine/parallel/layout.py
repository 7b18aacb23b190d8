"""How many ranks a worker has on each axis, and which rank stands where.

Ranks are numbered with tp fastest, then sp, pp, dp, so that the ranks that talk most stand side by
side on one host:

    rank = ((dp_index * pp + pp_index) * sp + sp_index) * tp + tp_index

Expert parallelism adds no ranks: it lays the experts over all dp x sp x tp ranks of a pipeline
stage. Each expert stands on `expert_tp` = dp * sp * tp / ep neighbouring ranks of one tp group,
split by features ("tp inside ep"). With ep=1 every tp group holds all experts, split by tp.

Source: vLLM lays ep over DP x PCP x TP and numbers ranks DP, PP, PCP, TP; SGLang's moe_tp_size is
tp / ep. DeepSeek-V3's deployment (dp attention with ep across) is "dp=8,ep=8" here.
"""

from dataclasses import dataclass, fields
from enum import StrEnum

MAX_RANKS = 1024


class Axis(StrEnum):
    """Ways to group the ranks."""

    WORLD = "world"
    """All ranks."""
    TP = "tp"
    PP = "pp"
    SP = "sp"
    DP = "dp"
    EP = "ep"
    EXPERT_TP = "expert_tp"
    """Ranks that hold the same experts, split by features."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelLayout:
    """Ranks by axis.

    Raises:
        ValueError: an axis is out of range, or the experts cannot be laid over the ranks.
    """

    tp: int = 1
    """Tensor: heads and feed-forward features are split."""
    pp: int = 1
    """Pipeline: layers are split."""
    ep: int = 1
    """Expert: experts are split, over the ranks of the other axes."""
    sp: int = 1
    """Sequence: tokens of a long prompt are split."""
    dp: int = 1
    """Data: requests are split."""
    interleave: int = 1
    """No axis: layer ranges on each stage of the pipeline, which a token goes round so often."""

    def __post_init__(self) -> None:
        for field in fields(self):
            size = getattr(self, field.name)
            if not 1 <= size <= MAX_RANKS:
                raise ValueError(f"{field.name} must be in [1, {MAX_RANKS}], got {size}")
        if self.interleave > 1 and self.pp == 1:
            raise ValueError(f"interleave={self.interleave} needs a pipeline; add pp=2 or more")
        if self.num_ranks > MAX_RANKS:
            raise ValueError(
                f"{self} has {self.num_ranks} ranks, more than {MAX_RANKS}: lower one of its axes"
            )
        if self.ep > 1 and (self.ep % self._num_token_groups or self._num_stage_ranks % self.ep):
            allowed = [str(size) for size in self.possible_ep]
            raise ValueError(
                f"ep={self.ep} does not fit {self}: the experts lie over the dp * sp * tp = "
                f"{self._num_stage_ranks} ranks of a stage, so ep must be 1, or a multiple of "
                f"dp * sp = {self._num_token_groups} that divides {self._num_stage_ranks}: "
                f"one of {', '.join(allowed)}"
            )

    @classmethod
    def parse(cls, text: str) -> "ParallelLayout":
        """Read "tp=2,pp=2"; axes left out are 1, and "1" or "" is a single rank.

        An ep larger than tp * sp, with no dp given, sets dp so that it fits: "ep=4" is "dp=4,ep=4".

        Raises:
            ValueError: the text names what to change.
        """
        sizes: dict[str, int] = {}
        names = [field.name for field in fields(cls)]
        parts = [] if text.strip() in {"", "1"} else text.split(",")
        for part in parts:
            name, separator, number = (piece.strip() for piece in part.partition("="))
            if not separator or name not in names:
                raise ValueError(
                    f"{part.strip()!r} in {text!r} is not <axis>=<ranks> with an axis of "
                    f"{', '.join(names)}; for instance tp=2,pp=2"
                )
            if name in sizes:
                raise ValueError(f"{name} stands twice in {text!r}")
            if not number.isdecimal() or len(number) > 6:
                raise ValueError(f"{name} must be a whole number of ranks, got {number!r}")
            sizes[name] = int(number)
        num_ranks_of_group = sizes.get("tp", 1) * sizes.get("sp", 1)
        if "dp" not in sizes and num_ranks_of_group and sizes.get("ep", 1) > num_ranks_of_group:
            sizes["dp"] = max(1, sizes["ep"] // num_ranks_of_group)
        return cls(**sizes)

    def __str__(self) -> str:
        """As `parse` reads it."""
        parts = [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]
        return ",".join(part for part in parts if not part.endswith("=1")) or "tp=1"

    @property
    def num_ranks(self) -> int:
        return self.pp * self._num_stage_ranks

    @property
    def expert_tp(self) -> int:
        """Ranks that share each expert."""
        return self.tp if self.ep == 1 else self._num_stage_ranks // self.ep

    def size(self, axis: Axis) -> int:
        """Ranks in each group of `axis`."""
        return self.num_ranks if axis is Axis.WORLD else int(getattr(self, axis.value))

    def index(self, axis: Axis, rank: int) -> int:
        """Where global `rank` stands in its group of `axis`."""
        return self.group(axis, rank).index(rank)

    def group(self, axis: Axis, rank: int) -> tuple[int, ...]:
        """Global ranks of the group of `axis` that `rank` is in, in the group's order."""
        return next(group for group in self.groups(axis) if rank in group)

    def groups(self, axis: Axis) -> tuple[tuple[int, ...], ...]:
        """All groups of an axis: each global rank stands in exactly one."""
        stride, size = self._stride(axis), self.size(axis)
        starts = (
            rank
            for rank in range(self.num_ranks)
            if self._position(axis, rank) // stride % size == 0
        )
        if axis in {Axis.EP, Axis.EXPERT_TP}:
            return tuple(
                tuple(self._rank_of_position(start, step * stride) for step in range(size))
                for start in starts
            )
        return tuple(tuple(start + step * stride for step in range(size)) for start in starts)

    def _stride(self, axis: Axis) -> int:
        """Distance of neighbours: in ranks, or in positions within a stage for expert axes."""
        strides = {
            Axis.WORLD: 1,
            Axis.TP: 1,
            Axis.SP: self.tp,
            Axis.PP: self.tp * self.sp,
            Axis.DP: self.tp * self.sp * self.pp,
            Axis.EXPERT_TP: 1,
            Axis.EP: self.expert_tp,
        }
        return strides[axis]

    def _position(self, axis: Axis, rank: int) -> int:
        """The number that `_stride` counts in: the rank, or its position within its stage."""
        if axis not in {Axis.EP, Axis.EXPERT_TP}:
            return rank
        group_ranks = self.tp * self.sp
        return rank // (group_ranks * self.pp) * group_ranks + rank % group_ranks

    def _rank_of_position(self, start: int, distance: int) -> int:
        """The rank `distance` positions after `start` in the same stage."""
        group_ranks = self.tp * self.sp
        stage = start // group_ranks % self.pp
        replica, within = divmod(self._position(Axis.EP, start) + distance, group_ranks)
        return (replica * self.pp + stage) * group_ranks + within

    @property
    def _num_stage_ranks(self) -> int:
        return self.dp * self.sp * self.tp

    @property
    def _num_token_groups(self) -> int:
        """Ranks of a stage by tp group: each has tokens of its own."""
        return self.dp * self.sp

    @property
    def possible_ep(self) -> list[int]:
        """Values of ep that the other axes allow, ascending."""
        groups = self._num_token_groups
        inside = [groups * size for size in range(1, self.tp + 1) if self.tp % size == 0]
        return sorted({1, *inside})
