"""Whether a model can be laid over a layout's ranks; asked before anything is started or read."""

from dataclasses import replace

from engine.checkpoint.config import ModelConfig
from engine.parallel.layout import ParallelLayout

_MAX_NAMED = 3


def check_layout_fits(config: ModelConfig, layout: ParallelLayout) -> None:
    """Return if every rank has a part of the model.

    Raises:
        ValueError: the text has the model's numbers and the nearest layouts that work.
    """
    most = {"tp": _most_tp(config), "pp": config.num_layers}
    parts = {
        "tp": f"tensor parallelism splits {config.num_heads} query heads, "
        f"{config.intermediate_size} features and {config.vocab_size} tokens",
        "pp": f"pipeline parallelism splits {config.num_layers} layers",
    }
    broken = [axis for axis, limit in most.items() if getattr(layout, axis) > limit]
    if not broken:
        return
    found = "; ".join(
        f"{axis}={getattr(layout, axis)} needs {axis} at most {most[axis]}: {parts[axis]}"
        for axis in broken
    )
    nearest = " or ".join(str(near) for near in _nearest(layout, most["tp"], most["pp"]))
    raise ValueError(f"the layout {layout} does not fit this model: {found}; use {nearest}")


def _most_tp(config: ModelConfig) -> int:
    return min(config.num_heads, config.intermediate_size, config.vocab_size)


def _nearest(layout: ParallelLayout, most_tp: int, most_pp: int) -> list[ParallelLayout]:
    """The same with fewer ranks, then with as many ranks in another product of tp and pp."""
    tp, pp = min(layout.tp, most_tp), min(layout.pp, most_pp)
    fewer = replace(layout, tp=tp, pp=pp, ep=1 if tp < layout.tp else layout.ep)
    num_ranks = layout.tp * layout.pp
    products = [
        replace(layout, tp=size, pp=num_ranks // size, ep=1 if size != layout.tp else layout.ep)
        for size in range(most_tp, 0, -1)
        if num_ranks % size == 0 and num_ranks // size <= most_pp
    ]
    return [fewer, *(near for near in products if near != fewer)][:_MAX_NAMED]
