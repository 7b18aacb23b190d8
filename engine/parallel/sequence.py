"""Attention over prompts whose tokens are split over ranks: keys and values are gathered first.

Every rank's pool holds all tokens after each layer, so that the next chunks, decode steps and the
handover find them wherever they look.

Shape suffixes: N tokens of this step on all ranks, T on this one, P blocks in the pool, J key then
value, G KV heads, C slots in a block, A head dim.
"""

import torch

from engine.kv_cache.batch import StepBatch
from engine.parallel.axes import AxisGroup


def gather_kv(kv_PJGCA: torch.Tensor, batch: StepBatch, axis: AxisGroup) -> None:
    """Write what the other ranks of `axis` have stored of this step in one layer; one all-gather.

    Nothing happens where the batch is not split: then all ranks have computed the same.
    """
    if batch.split is None:
        return
    block_size = kv_PJGCA.shape[3]
    block_T, offset_T = batch.slot_T // block_size, batch.slot_T % block_size
    kv_TJGA = kv_PJGCA[block_T, :, :, offset_T]
    kv_NJGA = axis.all_gather(kv_TJGA, 0, batch.split.num_tokens)
    slot_N = batch.split.slot_N
    kv_PJGCA[slot_N // block_size, :, :, slot_N % block_size] = kv_NJGA
