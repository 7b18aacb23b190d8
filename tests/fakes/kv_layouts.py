"""Group layouts as parallel workers have them, made from (tp, pp, sp)."""

from engine.kv_cache.layout import KvLayout
from kv_transfer.group_layout import GroupLayout, RankBox


def stage_layers(num_layers: int, pp: int, chunks: int = 1) -> list[tuple[int, ...]]:
    """Layers of each stage; with `chunks` above 1 every stage has several ranges of them."""
    num_ranges = pp * chunks
    starts = [index * num_layers // num_ranges for index in range(num_ranges + 1)]
    ranges = [range(starts[index], starts[index + 1]) for index in range(num_ranges)]
    return [
        tuple(layer for index in range(stage, num_ranges, pp) for layer in ranges[index])
        for stage in range(pp)
    ]


def tp_heads(num_query_heads: int, num_kv_heads: int, tp: int) -> list[tuple[int, ...]]:
    """KV heads that each rank's query heads read: uneven, and replicated where ranks share one."""
    starts = [-(-rank * num_query_heads // tp) for rank in range(tp + 1)]
    per_head = num_query_heads // num_kv_heads
    return [
        tuple(sorted({head // per_head for head in range(starts[rank], starts[rank + 1])}))
        for rank in range(tp)
    ]


def group_layout(
    full: KvLayout,
    *,
    num_query_heads: int | None = None,
    tp: int = 1,
    pp: int = 1,
    sp: int = 1,
    dp: int = 1,
    chunks: int = 1,
) -> GroupLayout:
    """Ranks with tp fastest, then sp, pp, dp."""
    heads = tp_heads(num_query_heads or full.num_kv_heads * tp, full.num_kv_heads, tp)
    boxes = [
        RankBox(layers, heads[tp_rank], shard, data_shard)
        for data_shard in range(dp)
        for layers in stage_layers(full.num_layers, pp, chunks)
        for shard in range(sp)
        for tp_rank in range(tp)
    ]
    return GroupLayout(full, tuple(boxes))
