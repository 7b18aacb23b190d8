"""How many KV blocks a pool gets: a pure function of what was asked and what is free."""

from dataclasses import dataclass

from engine.config import EngineConfig
from engine.kv_cache.layout import KvLayout

DEFAULT_MEMORY_FRACTION = {"cpu": 0.05, "cuda": 0.9}
"""Of what is free. On CPU every page is taken at start-up, and other programs live there too."""
DEFAULT_CPU_SEQUENCES = 2
"""A small host gives the pool this many whole contexts, unless that is half of what is free."""


class KvPoolTooSmallError(ValueError):
    """The pool cannot hold even one sequence; the text names what to change."""


@dataclass(frozen=True, slots=True)
class KvPoolPlan:
    """A pool of `num_blocks` blocks of `layout`."""

    layout: KvLayout
    num_blocks: int

    @property
    def num_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


def plan_kv_pool(
    config: EngineConfig,
    layout: KvLayout,
    *,
    device_type: str,
    free_bytes: int,
    max_context_tokens: int,
) -> KvPoolPlan:
    """Fill the memory asked for with blocks, at most what `max_num_sequences` could ever hold.

    Raises:
        KvPoolTooSmallError: not one sequence of `max_context_tokens` fits.
    """
    blocks_per_sequence = layout.num_blocks_for(max_context_tokens)
    if config.kv_pool_bytes is not None:
        if config.kv_pool_bytes > free_bytes:
            raise KvPoolTooSmallError(
                f"kv_pool_bytes is {config.kv_pool_bytes}, but only {free_bytes} bytes are free on "
                f"{device_type}; lower kv_pool_bytes"
            )
        num_bytes = config.kv_pool_bytes
    else:
        fraction = config.kv_memory_fraction or DEFAULT_MEMORY_FRACTION[device_type]
        num_bytes = int(free_bytes * fraction)
        if config.kv_memory_fraction is None and device_type == "cpu":
            wanted_bytes = DEFAULT_CPU_SEQUENCES * blocks_per_sequence * layout.block_bytes
            num_bytes = max(num_bytes, min(wanted_bytes, free_bytes // 2))
    num_blocks = num_bytes // layout.block_bytes
    if num_blocks < blocks_per_sequence:
        raise KvPoolTooSmallError(
            f"a KV pool of {num_bytes} bytes holds {num_blocks * layout.block_size_tokens} tokens, "
            f"less than one context of {max_context_tokens}; it needs "
            f"{blocks_per_sequence * layout.block_bytes} bytes: raise kv_pool_bytes or "
            "kv_memory_fraction, or lower max_context_tokens"
        )
    return KvPoolPlan(layout, min(num_blocks, blocks_per_sequence * config.max_num_sequences))
