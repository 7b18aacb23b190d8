"""The halves of a plain decoder layer, each as one call of the C library, and all layers as one.

Shape suffixes: T tokens of this step, D model dim, A one a rotated pair, P blocks in the pool,
J key then value, G KV heads, C slots in a block.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from engine.kernels.interface import AttentionParts, MlpParts
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_structures import AttentionHalf, HalfLinear, MlpHalf, WholeLayer
from engine.kv_cache.scaled_rows import values_of_row


class NativeStep(Protocol):
    """What the halves need of the kernels whose step they take part in."""

    dtype: torch.dtype
    library: NativeLibrary
    plan_address: int

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a result."""

    def kv_shape_address(self, kv_PJGCA: torch.Tensor) -> int:
        """Of the `KvShape` of one layer's view of the pool."""


class NativeAttention:
    """A `FusedAttention`."""

    def __init__(self, step: NativeStep, parts: AttentionParts) -> None:
        self._step = step
        self.parts = parts  # owns the memory that the structure points into
        norms_A = (parts.q_norm_A, parts.k_norm_A)
        assert all(norm_A is None or norm_A.is_contiguous() for norm_A in norms_A)
        self._half = AttentionHalf(
            _address(parts.norm_D),
            *(_address(norm_A) for norm_A in norms_A),
            HalfLinear.of(parts.qkv),
            HalfLinear.of(parts.output),
            parts.heads.num_heads,
            parts.window or 0,
            parts.norm_eps,
            parts.head_norm_eps,
            parts.scale,
        )
        self.address = ctypes.addressof(self._half)

    def __call__(
        self,
        added_TD: torch.Tensor | None,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
    ) -> torch.Tensor:
        step = self._step
        num_rows = residual_TD.shape[0]
        self.check(num_rows, cos_TA, sin_TA, kv_PJGCA)
        added = _address_of_added(added_TD, residual_TD, step.dtype)
        y_TD = step.empty(num_rows, self.parts.output.out_features, step.dtype)
        step.library.attention_half(
            *(self.address, step.plan_address, added, residual_TD.data_ptr()),
            *(cos_TA.data_ptr(), sin_TA.data_ptr(), kv_PJGCA.data_ptr()),
            *(step.kv_shape_address(kv_PJGCA), y_TD.data_ptr()),
        )
        return y_TD

    def check(
        self, num_rows: int, cos_TA: torch.Tensor, sin_TA: torch.Tensor, kv_PJGCA: torch.Tensor
    ) -> None:
        """What a call assumes of the tensors that it reads by address."""
        heads = self.parts.heads
        assert cos_TA.dtype is sin_TA.dtype is torch.float32
        assert cos_TA.shape == sin_TA.shape == (num_rows, heads.head_dim // 2), cos_TA.shape
        assert cos_TA.is_contiguous()
        assert sin_TA.is_contiguous()
        assert kv_PJGCA.shape[2] == heads.num_kv_heads, kv_PJGCA.shape
        assert values_of_row(kv_PJGCA) == heads.head_dim, kv_PJGCA.shape


class NativeMlp:
    """A `FusedMlp`."""

    def __init__(self, step: NativeStep, parts: MlpParts) -> None:
        self._step = step
        self.parts = parts
        self._half = MlpHalf(
            _address(parts.norm_D),
            HalfLinear.of(parts.gate_up),
            HalfLinear.of(parts.down),
            parts.norm_eps,
        )
        self.address = ctypes.addressof(self._half)

    def __call__(self, added_TD: torch.Tensor | None, residual_TD: torch.Tensor) -> torch.Tensor:
        step = self._step
        added = _address_of_added(added_TD, residual_TD, step.dtype)
        y_TD = step.empty(residual_TD.shape[0], self.parts.down.out_features, step.dtype)
        step.library.mlp_half(
            *(self.address, step.plan_address, added, residual_TD.data_ptr(), y_TD.data_ptr())
        )
        return y_TD


class NativeLayers:
    """A `FusedLayers`."""

    def __init__(
        self, step: NativeStep, layers: Sequence[tuple[NativeAttention, NativeMlp]]
    ) -> None:
        self._step = step
        self._layers = layers  # owns the structures that these point to
        self._array = (WholeLayer * len(layers))()
        for whole, (attention, mlp) in zip(self._array, layers, strict=True):
            whole.attention, whole.mlp = attention.address, mlp.address

    def __call__(
        self,
        residual_TD: torch.Tensor,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_LPJGCA: Sequence[torch.Tensor],
        *,
        stops: Sequence[int] = (),
        on_stop: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        step, first_PJGCA = self._step, kv_LPJGCA[0]
        num_rows, dim = residual_TD.shape
        self._layers[0][0].check(num_rows, cos_TA, sin_TA, first_PJGCA)
        for whole, kv_PJGCA in zip(self._array, kv_LPJGCA, strict=True):
            assert kv_PJGCA.stride() == first_PJGCA.stride(), "layers of one pool are alike"
            whole.kv_memory = kv_PJGCA.data_ptr()
        _address_of_added(None, residual_TD, step.dtype)
        attended_TD = step.empty(num_rows, dim, step.dtype)
        added_TD = step.empty(num_rows, dim, step.dtype)
        first = 0
        for end in (*stops, len(self._array)):
            step.library.layers(
                *(ctypes.addressof(self._array), first, end, step.plan_address),
                *(residual_TD.data_ptr(), cos_TA.data_ptr(), sin_TA.data_ptr()),
                *(step.kv_shape_address(first_PJGCA), attended_TD.data_ptr(), added_TD.data_ptr()),
            )
            if end in stops and on_stop is not None:
                on_stop(end)
            first = end
        return added_TD


def _address(x: torch.Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _address_of_added(
    added_TD: torch.Tensor | None, residual_TD: torch.Tensor, dtype: torch.dtype
) -> int | None:
    assert residual_TD.dtype is dtype, residual_TD.dtype
    assert residual_TD.is_contiguous()
    if added_TD is None:
        return None
    assert added_TD.dtype is dtype, added_TD.dtype
    assert added_TD.shape == residual_TD.shape, (added_TD.shape, residual_TD.shape)
    assert added_TD.is_contiguous()
    return added_TD.data_ptr()
