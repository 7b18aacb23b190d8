"""What the C library reads in memory: the structures of native/isthmus.h and native/layer.c.

They hold addresses: whoever makes one keeps what owns the memory.

Shape suffixes: F output features, P blocks in the pool, J key then value, G KV heads, C slots in a
block, A head dim.
"""

import ctypes
from dataclasses import dataclass

import torch

from engine.kernels.interface import PackedLinear
from engine.kv_cache.batch import StepBatch
from engine.kv_cache.scaled_rows import values_of_row

SCALING_CODES = {torch.int8: 1, torch.float8_e4m3fn: 2}

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


@dataclass(frozen=True, slots=True)
class PackedPanels:
    """A weight in the library's layout, and the address that calls need."""

    memory: torch.Tensor
    address: int
    bias_F: torch.Tensor | None
    """float32, whatever the weight is."""
    bias_address: int | None


class KvShape(ctypes.Structure):
    """How one layer's keys and values lie in the pool."""

    _fields_ = [
        *(("num_heads", _long), ("block_size", _long), ("head_dim", _long)),
        *(("block_stride", _long), ("side_stride", _long), ("head_stride", _long)),
        *(("slot_stride", _long), ("scaling", _long)),
    ]

    @classmethod
    def of(cls, kv_PJGCA: torch.Tensor) -> "KvShape":
        """Sizes and strides of one layer's view of the pool."""
        strides = kv_PJGCA.stride()
        assert strides[3:] == (kv_PJGCA.shape[4], 1), strides
        scaling = SCALING_CODES.get(kv_PJGCA.dtype, 0)
        return cls(*kv_PJGCA.shape[2:4], values_of_row(kv_PJGCA), *strides[:4], scaling)


class StepPlan(ctypes.Structure):
    """What all calls of a step have in common."""

    _fields_ = [
        *(("slot", _pointer), ("block_table", _pointer), ("query_start", _pointer)),
        *(("context_len", _pointer), ("num_rows", _long), ("num_sequences", _long)),
        *(("table_stride", _long), ("dtype", _int), ("num_threads", _int)),
    ]

    def begin(self, batch: StepBatch) -> None:
        """Point into `batch`, which the caller keeps as long as the step runs."""
        num_sequences = len(batch.query_lens)
        assert batch.slot_T.dtype is torch.int64
        assert batch.block_table_BW.dtype is torch.int32
        assert batch.query_start_B1.dtype is batch.context_len_B.dtype is torch.int32
        assert batch.slot_T.is_contiguous()
        assert batch.query_start_B1.shape == (num_sequences + 1,), batch.query_start_B1.shape
        assert batch.context_len_B.shape == (num_sequences,), batch.context_len_B.shape
        self.slot = batch.slot_T.data_ptr()
        self.block_table = batch.block_table_BW.data_ptr()
        self.query_start = batch.query_start_B1.data_ptr()
        self.context_len = batch.context_len_B.data_ptr()
        self.num_rows = batch.slot_T.shape[0]
        self.num_sequences = num_sequences
        self.table_stride = batch.block_table_BW.stride(0)
        self.num_threads = batch.num_threads


class HalfLinear(ctypes.Structure):
    """One linear layer of a half."""

    _fields_ = [("packed", _pointer), ("bias", _pointer), ("inner", _long), ("num_out", _long)]

    @classmethod
    def of(cls, packed: PackedLinear) -> "HalfLinear":
        """Addresses into `packed`, which the caller keeps."""
        panels = packed.weight
        assert isinstance(panels, PackedPanels)
        return cls(panels.address, panels.bias_address, packed.in_features, packed.out_features)


class AttentionHalf(ctypes.Structure):
    """From the residual to the attention's output."""

    _fields_ = [
        *(("norm", _pointer), ("q_norm", _pointer), ("k_norm", _pointer)),
        *(("qkv", HalfLinear), ("output", HalfLinear), ("num_heads", _long), ("window", _long)),
        *(("eps", _float), ("head_eps", _float), ("scale", _float)),
    ]


class MlpHalf(ctypes.Structure):
    """From the residual to the feed-forward block's output."""

    _fields_ = [
        *(("norm", _pointer), ("gate_up", HalfLinear), ("down", HalfLinear), ("eps", _float)),
    ]


class WholeLayer(ctypes.Structure):
    """Both halves of a layer, and where its keys and values lie."""

    _fields_ = [("attention", _pointer), ("mlp", _pointer), ("kv_memory", _pointer)]
