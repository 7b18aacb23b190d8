"""Which layers see a window of the context only: the rules that families share."""

from collections.abc import Callable

from engine.checkpoint.fields import Fields
from engine.errors import CheckpointError

Windows = Callable[[Fields, int], tuple[int | None, ...]]
"""From the fields of config.json and the number of layers to a window, or None, for each."""


def no_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Every layer sees everything."""
    return (None,) * num_layers


def same_window(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """`sliding_window`, where it is a number, holds for every layer."""
    return (fields.optional_integer("sliding_window"),) * num_layers


def window_if_used(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """`sliding_window` for every layer where `use_sliding_window` says so."""
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    return same_window(fields, num_layers)


def windows_by_type(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """As `layer_types` names them; without it all layers but each `sliding_window_pattern`th."""
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        period = fields.size("sliding_window_pattern")
        sliding = [(index + 1) % period != 0 for index in range(num_layers)]
    else:
        known = {"sliding_attention": True, "full_attention": False}
        if (
            not isinstance(layer_types, list)
            or len(layer_types) != num_layers
            or not all(isinstance(name, str) and name in known for name in layer_types)
        ):
            raise CheckpointError(f"{fields.source}: layer_types must name {num_layers} layers")
        sliding = [known[name] for name in layer_types]
    if not any(sliding):
        return (None,) * num_layers
    window = fields.size("sliding_window")
    return tuple(window if is_sliding else None for is_sliding in sliding)
