"""Whether a model can be laid over a layout's ranks; asked before anything is started or read."""

from collections.abc import Mapping
from dataclasses import replace

from engine.checkpoint.config import ModelConfig
from engine.parallel.layout import ParallelLayout

_MAX_NAMED = 3


def check_layout_fits(config: ModelConfig, layout: ParallelLayout) -> None:
    """Return if every rank has a part of the model.

    Raises:
        ValueError: the text has the model's numbers and the nearest layouts that work.
    """
    experts = config.form.experts
    most = {
        "tp": _most_tp(config),
        "pp": config.num_layers,
        "ep": 1 if experts is None else experts.num_experts,
    }
    parts = {
        "ep": "expert parallelism splits experts, of which it has none"
        if experts is None
        else f"expert parallelism splits the {experts.num_experts} experts of a layer",
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
    nearest = " or ".join(str(near) for near in _nearest(layout, most))
    raise ValueError(f"the layout {layout} does not fit this model: {found}; use {nearest}")


def _most_tp(config: ModelConfig) -> int:
    return min(config.num_heads, config.intermediate_size, config.vocab_size)


def _nearest(layout: ParallelLayout, most: Mapping[str, int]) -> list[ParallelLayout]:
    """The same with fewer ranks, then with as many ranks in another product of tp and pp."""
    tp, pp, dp = min(layout.tp, most["tp"]), min(layout.pp, most["pp"]), layout.dp
    if layout.ep > most["ep"]:
        dp = min(dp, max(1, most["ep"] // layout.sp))
    fewer = _with_fitting_ep(replace(layout, tp=tp, pp=pp, dp=dp, ep=1), layout.ep, most["ep"])
    num_ranks = layout.tp * layout.pp
    products = [
        _with_fitting_ep(
            replace(layout, tp=size, pp=num_ranks // size, ep=1), layout.ep, most["ep"]
        )
        for size in range(most["tp"], 0, -1)
        if num_ranks % size == 0 and num_ranks // size <= most["pp"]
    ]
    near = [found for found in (fewer, *products) if found != layout]
    return list(dict.fromkeys(near))[:_MAX_NAMED]


def _with_fitting_ep(layout: ParallelLayout, wanted: int, most: int) -> ParallelLayout:
    """The largest ep up to `wanted` that lies over the layout's ranks and leaves each an expert."""
    fitting = [size for size in layout.possible_ep if size <= min(wanted, most)]
    return replace(layout, ep=max(fitting))
