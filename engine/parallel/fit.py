"""Whether a model can be laid over a layout's ranks; asked before anything is started or read."""

from collections.abc import Mapping
from dataclasses import replace

from engine.checkpoint.config import ModelConfig
from engine.parallel.layout import MAX_RANKS, ParallelLayout

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
        "expert_tp": MAX_RANKS if experts is None else experts.intermediate_size,
        "interleave": max(1, config.num_layers // layout.pp),
    }
    parts = {
        "ep": "expert parallelism splits experts, of which it has none"
        if experts is None
        else f"expert parallelism splits the {experts.num_experts} experts of a layer",
        "expert_tp": ""
        if experts is None
        else f"so many ranks share an expert (dp * sp * tp / ep, or tp with ep=1), whose "
        f"{experts.intermediate_size} features they split",
        "tp": f"tensor parallelism splits {config.num_heads} query heads, "
        f"{config.intermediate_size} features{_shared(config)} and {config.vocab_size} tokens",
        "pp": f"pipeline parallelism splits {config.num_layers} layers",
        "interleave": f"{layout.pp} stages have as many ranges each, of {config.num_layers} layers",
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
    shared_size = 0 if config.form.experts is None else config.form.experts.shared_size
    features = min(config.intermediate_size, shared_size or config.intermediate_size)
    return min(config.num_heads, features, config.vocab_size)


def _shared(config: ModelConfig) -> str:
    experts = config.form.experts
    if experts is None or not experts.shared_size:
        return ""
    return f" ({experts.shared_size} of a shared expert)"


def _nearest(layout: ParallelLayout, most: Mapping[str, int]) -> list[ParallelLayout]:
    """The same with fewer ranks, then with as many ranks in another product of tp and pp."""
    tp, pp, dp = min(layout.tp, most["tp"]), min(layout.pp, most["pp"]), layout.dp
    if layout.ep > most["ep"]:
        dp = min(dp, max(1, most["ep"] // layout.sp))
    plain = replace(layout, ep=1, interleave=1)
    fewer = [
        _as_wanted(replace(plain, tp=size, pp=pp, dp=dp), layout, most)
        for size in (tp, min(tp, most["expert_tp"]))
    ]
    num_ranks = layout.tp * layout.pp
    products = [
        _as_wanted(replace(plain, tp=size, pp=num_ranks // size), layout, most)
        for size in range(most["tp"], 0, -1)
        if num_ranks % size == 0 and num_ranks // size <= most["pp"]
    ]
    near = [found for found in (*fewer, *products) if found is not None and found != layout]
    return list(dict.fromkeys(near))[:_MAX_NAMED]


def _as_wanted(
    plain: ParallelLayout, wanted: ParallelLayout, most: Mapping[str, int]
) -> ParallelLayout | None:
    """With the largest ep and interleave up to those wanted that the ranks and the model allow.

    With a larger ep where experts have not enough features for so many ranks; None if none helps.
    """
    fitting = [
        size
        for size in plain.possible_ep
        if size <= most["ep"] and replace(plain, ep=size).expert_tp <= most["expert_tp"]
    ]
    if not fitting:
        return None
    ep = max((size for size in fitting if size <= wanted.ep), default=min(fitting))
    num_ranges = min(wanted.interleave, most["pp"] // plain.pp) if plain.pp > 1 else 1
    return replace(plain, ep=ep, interleave=num_ranges)
