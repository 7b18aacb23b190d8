"""When others hear of KV that a step under way has written: what sends it takes turns with it."""

import math
from collections.abc import Sequence

from engine.scheduling.step_plan import StepPlan

NEWS_BYTES = 1 << 20
"""KV that a rank has computed of a step before others hear of it: less is not worth a message."""
KEPT_SHARE = 0.6
"""Of a prompt's KV. On one core, sending takes about 4 % of the time of computing: so much later
comes the first token if all is sent before it, and the second one if nothing is."""


def is_news(num_tokens: int, bytes_per_token: int) -> bool:
    """Whether it is worth a message that a step of so many tokens is being computed."""
    return num_tokens * bytes_per_token > NEWS_BYTES


def layers_told(
    plans: Sequence[StepPlan], num_layers: int, bytes_per_token: int, *, has_spare_core: bool
) -> range:
    """How many layers are there whenever it is told of them; the end of the step is apart.

    Where every core computes, sending takes turns with that, and each turn costs more than its
    bytes: then a step is told of once, or not at all, so that of what its sequences have until
    then at most KEPT_SHARE leaves when it is over, beside its first tokens.

    Args:
        plans: the micro-batches of a step.
        num_layers: of the rank's pool, as `bytes_per_token` are.
        bytes_per_token: of all of these layers.
        has_spare_core: the step leaves a core of the process to others.
    """
    chunks = [chunk for plan in plans for chunk in plan.chunks]
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    interval = -(-NEWS_BYTES * num_layers // (max(1, num_tokens) * bytes_per_token))
    if has_spare_core:
        return range(interval, num_layers, interval)
    if not any(chunk.is_drawing for chunk in chunks):
        return range(0)
    num_before = sum(chunk.first_position for chunk in chunks)
    kept_share = KEPT_SHARE * (num_before + num_tokens) / num_tokens
    first = max(interval, math.ceil(num_layers * (1 - kept_share)))
    return range(first, num_layers, num_layers) if kept_share < 1 else range(0)
