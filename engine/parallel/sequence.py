"""Keys and values of prompts whose tokens are split over ranks: how they come to all of them.

Every rank's pool holds all tokens after each layer, so that the next chunks, decode steps and the
handover find them wherever they look.

Shape suffixes: N tokens of this step on all ranks, T on this one, P blocks in the pool, J key then
value, G KV heads, C slots in a block, A head dim.
"""

from collections.abc import Iterator

import torch

from engine.kv_cache.batch import KeySpans, StepBatch
from engine.parallel.axes import AxisGroup


def gather_kv(kv_PJGCA: torch.Tensor, batch: StepBatch, axis: AxisGroup) -> None:
    """Write what the other ranks of `axis` have stored of this step in one layer; one all-gather.

    Nothing happens where the batch is not split: then all ranks have computed the same.
    """
    if batch.split is None:
        return
    kv_TJGA = _load(kv_PJGCA, batch.slot_T)
    kv_NJGA = axis.all_gather(kv_TJGA, 0, batch.split.num_tokens)
    _store(kv_PJGCA, batch.split.slot_N, kv_NJGA)


def pass_kv_round(kv_PJGCA: torch.Tensor, batch: StepBatch, axis: AxisGroup) -> Iterator[KeySpans]:
    """The same in a ring: what came last is yielded while the next part travels.

    Each rank sends what it got from the rank before to the rank after, its own first: size - 1
    shifts. The iterator must be used up.

    Yields:
        What this rank's queries see of its own tokens and of earlier steps; then of each other
        rank's, which stand in the pool now.
    """
    split = batch.split
    assert split is not None
    assert split.ring is not None
    slots = split.slot_N.split(split.num_tokens)
    kv_TJGA = _load(kv_PJGCA, batch.slot_T)
    came_from = axis.rank
    for distance in range(1, axis.size):
        source = (axis.rank - distance) % axis.size
        shifted = axis.begin_shift(kv_TJGA, split.num_tokens[source])
        yield split.ring[came_from]
        kv_TJGA, came_from = shifted(), source
        _store(kv_PJGCA, slots[source], kv_TJGA)
    yield split.ring[came_from]


def _load(kv_PJGCA: torch.Tensor, slot_T: torch.Tensor) -> torch.Tensor:
    block_size = kv_PJGCA.shape[3]
    return kv_PJGCA[slot_T // block_size, :, :, slot_T % block_size]


def _store(kv_PJGCA: torch.Tensor, slot_T: torch.Tensor, kv_TJGA: torch.Tensor) -> None:
    block_size = kv_PJGCA.shape[3]
    kv_PJGCA[slot_T // block_size, :, :, slot_T % block_size] = kv_TJGA
