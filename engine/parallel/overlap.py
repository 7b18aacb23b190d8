"""When sums over a tensor axis travel while the rank computes."""

from engine.parallel.axes import AxisGroup

_NUM_PARTS = 2
MIN_PART_TOKENS = 64
"""Shorter parts spend more time on reading the weights once more than an exchange takes."""


def num_overlapped(axis: AxisGroup, num_tokens: int) -> int:
    """Into how many parts a step of so many tokens is cut, alike on all ranks of the axis.

    Causal attention lets the first half of the tokens go ahead in each layer: while its sum
    travels, the second half is computed, and the other way round. 1 where nothing travels by
    itself, or so fast that a second part would cost more.
    """
    if not axis.is_in_background or num_tokens < _NUM_PARTS * MIN_PART_TOKENS:
        return 1
    return _NUM_PARTS
