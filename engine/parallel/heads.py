"""Which heads stand on which rank of the tensor axis."""

from dataclasses import dataclass

from engine.kernels.interface import HeadShape
from engine.parallel.spread import spread


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSplit:
    """One rank's heads, counted over the whole model.

    Query heads attend evenly: each KV head serves len(heads) / len(kv_heads) of them.
    """

    heads: range
    kv_heads: range
    copy: int = 0
    """Which of the ranks that hold this KV head it is, in rank order."""
    num_copies: int = 1
    """Ranks that hold each KV head of this rank."""


def head_split(heads: HeadShape, size: int, rank: int) -> HeadSplit:
    """The heads of `rank` among the `size` ranks of a tensor axis, which they need not divide by.

    Up to as many ranks as there are KV heads, whole groups (a KV head with its query heads) are
    spread over the ranks. On more ranks each KV head stands on several, side by side, over which
    its query heads are spread. Either way what a rank holds is grouped evenly, as kernels want it,
    and ranks differ by one group at most, or by one head those of the same KV head.

    Raises:
        ValueError: there are more ranks than query heads.
    """
    group = heads.num_heads // heads.num_kv_heads
    if size > heads.num_heads:
        raise ValueError(
            f"tp={size} needs a query head for each rank, and the model has {heads.num_heads}"
        )
    if size <= heads.num_kv_heads:
        kv_heads = spread(heads.num_kv_heads, size, what="num_kv_heads")[rank]
        return HeadSplit(
            heads=range(kv_heads.start * group, kv_heads.stop * group), kv_heads=kv_heads
        )
    kv_head, ranks = next(
        (kv_head, ranks)
        for kv_head, ranks in enumerate(spread(size, heads.num_kv_heads, what="tp"))
        if rank in ranks
    )
    copy = rank - ranks.start
    within = spread(group, len(ranks), what="the query heads of a KV head")[copy]
    first = kv_head * group
    return HeadSplit(
        heads=range(first + within.start, first + within.stop),
        kv_heads=range(kv_head, kv_head + 1),
        copy=copy,
        num_copies=len(ranks),
    )


def features_of(heads: range, head_dim: int) -> range:
    """The features of some heads, where each has `head_dim`."""
    return range(heads.start * head_dim, heads.stop * head_dim)
