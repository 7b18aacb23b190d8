"""Which layers stand on which stage of the pipeline."""

from itertools import accumulate

from engine.checkpoint.config import ModelConfig


def stage_layers(
    config: ModelConfig,
    size: int,
    stage: int,
    num_ranges: int = 1,
    *,
    is_for_prompts: bool = False,
) -> tuple[range, ...]:
    """The layers of `stage` among `size`: contiguous ranges, each of at least one layer.

    With several ranges, interleaved, the stages are gone round once for each: range r of the model
    stands on stage r modulo `size`. All ranges are cut so that they cost alike. The cost of one is
    the weights that it reads for one token: those of its layers, a row of the embedding in the
    first, and the LM head in the last: every token that is decoded needs it, but one of a prompt's.
    The dearest is as cheap as can be; among such cuts, ranges are as even as can be.

    Raises:
        ValueError: there are more ranges than layers.
    """
    num_layers, num_parts = config.num_layers, size * num_ranges
    if num_parts > num_layers:
        layout = f"pp={size}" if num_ranges == 1 else f"pp={size},interleave={num_ranges}"
        what = "stage" if num_ranges == 1 else "range of each stage"
        raise ValueError(f"{layout} needs a layer for each {what}, and the model has {num_layers}")
    costs = [layer_cost(config, index) for index in range(num_layers)]
    costs[0] += config.hidden_size
    if not is_for_prompts:
        costs[-1] += config.vocab_size * config.hidden_size
    starts = [*_even_starts(costs, num_parts), num_layers]
    return tuple(range(starts[part], starts[part + 1]) for part in range(stage, num_parts, size))


def layer_cost(config: ModelConfig, index: int) -> int:
    """Weights of a layer that one token is multiplied with."""
    features, experts = config.intermediate_size, config.form.experts
    if experts is not None and index in experts.layers:
        features = experts.num_chosen * experts.intermediate_size + experts.shared_size
    return _attention_cost(config) + 3 * config.hidden_size * features


def _attention_cost(config: ModelConfig) -> int:
    hidden_size, num_heads, latent = config.hidden_size, config.num_heads, config.form.latent
    if latent is None:
        return 2 * hidden_size * (num_heads + config.num_kv_heads) * config.head_dim
    query_features = num_heads * (latent.nope_dim + latent.rope_dim)
    query = hidden_size * query_features
    if latent.query_rank is not None:
        query = latent.query_rank * (hidden_size + query_features)
    key_value = hidden_size * config.head_dim
    key_value += num_heads * latent.kv_rank * (latent.nope_dim + latent.value_dim)
    return query + key_value + num_heads * latent.value_dim * hidden_size


def _even_starts(costs: list[int], num_parts: int) -> list[int]:
    """Where each part starts, so that (dearest part, sum of squares) is least."""
    before = [0, *accumulate(costs)]
    num_items = len(costs)
    worst: list[tuple[int, int]] = [(cost, cost * cost) for cost in before]
    cuts: list[list[int]] = []
    for part in range(1, num_parts):
        best: list[tuple[int, int]] = [(0, 0)] * (num_items + 1)
        cut = [0] * (num_items + 1)
        for stop in range(part + 1, num_items + 1):
            found: tuple[int, int] | None = None
            for start in range(stop - 1, part - 1, -1):
                cost = before[stop] - before[start]
                if found is not None and cost > found[0]:
                    break
                dearest, squares = worst[start]
                candidate = (max(dearest, cost), squares + cost * cost)
                if found is None or candidate < found:
                    found, cut[stop] = candidate, start
            assert found is not None
            best[stop] = found
        worst = best
        cuts.append(cut)
    starts = [num_items]
    for cut in reversed(cuts):
        starts.append(cut[starts[-1]])
    return [0, *reversed(starts[1:])]
