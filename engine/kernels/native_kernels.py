"""Kernels of the C library, for float32 and bfloat16 on CPU.

A token's result does not depend on what else is in the batch, nor on how its prompt was cut into
chunks, nor on the number of threads: all sums run in one fixed order.

Shape suffixes: T tokens of this step, D model dim, F output features, H query heads, G KV heads,
A head dim, P blocks in the pool, J key then value, C slots in a block.
"""

import ctypes
import logging
from collections.abc import Sequence

import torch

from engine.kernels.attention_part import AttentionPart
from engine.kernels.interface import (
    AttentionParts,
    FusedAttention,
    FusedLayers,
    FusedMlp,
    HeadShape,
    MlpParts,
    PackedLinear,
)
from engine.kernels.native_layer import NativeAttention, NativeLayers, NativeMlp
from engine.kernels.native_library import NativeLibrary
from engine.kernels.native_structures import KvShape, PackedPanels, StepPlan
from engine.kernels.page_memory import PageMemory, ResultMemory
from engine.kernels.torch_kernels import TorchKernels
from engine.kv_cache.batch import KeySpans, StepBatch
from engine.kv_cache.scaled_rows import is_scaled, values_of_row

logger = logging.getLogger(__name__)

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
NUM_ROWS_FEW = 16
"""Up to this many rows an operation on rows is over in microseconds."""
NUM_ELEMENTS_LARGE = 65536
"""From this size on a result lies in memory of our own."""


class NativeKernels:
    """One object serves one engine thread: the step's plan is kept between calls."""

    def __init__(self, library: NativeLibrary, dtype: torch.dtype) -> None:
        self.name = f"native-{library.level_names()[-1]}"
        self.library = library
        self.dtype = dtype
        self._code = DTYPE_CODES[dtype]
        self._weights = PageMemory()
        self._results = ResultMemory()
        self._num_threads = 1
        self._torch = TorchKernels(torch.device("cpu"))
        self._lacking: set[str] = set()
        self._kv_key: tuple[object, ...] = ()
        self._kv_shape = KvShape()
        self._batch: StepBatch | None = None
        self._plan = StepPlan(dtype=self._code)
        self.plan_address = ctypes.addressof(self._plan)

    def begin_step(self, batch: StepBatch) -> None:
        self._batch = batch  # owns the memory that the plan points into
        self._plan.begin(batch)
        self._num_threads = batch.num_threads
        self._use_torch_threads(1)

    def pack_linear(self, weight_FD: torch.Tensor, bias_F: torch.Tensor | None) -> PackedLinear:
        num_out, inner = weight_FD.shape
        weight_FD = weight_FD.detach().to(self.dtype)
        if weight_FD.stride(1) != 1:
            weight_FD = weight_FD.contiguous()
        num_bytes = self.library.packed_bytes(self._code, num_out, inner)
        memory = torch.frombuffer(self._weights.take(num_bytes), dtype=torch.uint8)
        self.library.pack(
            self._code,
            *(weight_FD.data_ptr(), weight_FD.stride(0), num_out, inner, memory.data_ptr()),
        )
        bias_F = None if bias_F is None else bias_F.detach().float().contiguous()
        bias_address = None if bias_F is None else bias_F.data_ptr()
        panels = PackedPanels(memory, memory.data_ptr(), bias_F, bias_address)
        return PackedLinear(inner, num_out, panels, bias_F)

    def linear(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        y_TF = self.empty(x_TD.shape[0], packed.out_features, self.dtype)
        self._linear_into(y_TF, x_TD, packed)
        return y_TF

    def linear_float32(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        y_TF = self.empty(x_TD.shape[0], packed.out_features, torch.float32)
        self._linear_into(y_TF, x_TD, packed)
        return y_TF

    def linear_silu_mul(self, x_TD: torch.Tensor, packed: PackedLinear) -> torch.Tensor:
        num_out = packed.out_features // 2
        if not self.library.has_gated(self._code, num_out):
            return self.silu_mul(self.linear(x_TD, packed))
        y_TF = self.empty(x_TD.shape[0], num_out, self.dtype)
        self._linear_into(y_TF, x_TD, packed, is_gated=True)
        return y_TF

    def _linear_into(
        self,
        y_TF: torch.Tensor,
        x_TD: torch.Tensor,
        packed: PackedLinear,
        *,
        is_gated: bool = False,
    ) -> None:
        panels = packed.weight
        assert isinstance(panels, PackedPanels)
        num_rows, inner = x_TD.shape
        row_stride, stride = x_TD.stride()
        assert x_TD.dtype is self.dtype, x_TD.dtype
        assert inner == packed.in_features, (inner, packed.in_features)
        assert stride == 1, stride
        if num_rows == 0:  # the library divides by the number of ranges
            return
        self.library.linear(
            *(self._code, x_TD.data_ptr(), row_stride, panels.address, panels.bias_address),
            *(y_TF.data_ptr(), y_TF.dtype is torch.float32, is_gated),
            *(num_rows, inner, y_TF.shape[1], self._num_threads),
        )

    def rms_norm(self, x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
        if weight_D.dtype is not self.dtype:
            return self._torch_for("norms with float32 weights").rms_norm(x_TD, weight_D, eps)
        return self._norm(x_TD, None, weight_D, eps)

    def add_rms_norm(
        self, x_TD: torch.Tensor, residual_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        if weight_D.dtype is not self.dtype:
            kernels = self._torch_for("norms with float32 weights")
            return kernels.add_rms_norm(x_TD, residual_TD, weight_D, eps)
        assert residual_TD.dtype is self.dtype, residual_TD.dtype
        assert residual_TD.shape == x_TD.shape, (residual_TD.shape, x_TD.shape)
        assert residual_TD.is_contiguous()
        return self._norm(x_TD, residual_TD.data_ptr(), weight_D, eps)

    def _norm(
        self, x_TD: torch.Tensor, residual: int | None, weight_D: torch.Tensor, eps: float
    ) -> torch.Tensor:
        num_rows, dim = x_TD.shape
        row_stride, stride = x_TD.stride()
        assert x_TD.dtype is self.dtype, x_TD.dtype
        assert weight_D.dtype is self.dtype, weight_D.dtype
        assert stride == 1, stride
        assert weight_D.shape == (dim,), weight_D.shape
        y_TD = self.empty(num_rows, dim, self.dtype)
        library = self.library
        call = library.rms_norm_few if num_rows <= NUM_ROWS_FEW else library.rms_norm
        call(
            *(self._code, x_TD.data_ptr(), row_stride, residual, weight_D.data_ptr(), eps),
            *(y_TD.data_ptr(), num_rows, dim, self._num_threads),
        )
        return y_TD

    def silu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        num_rows, width = gate_up_TF.shape
        assert gate_up_TF.dtype is self.dtype, gate_up_TF.dtype
        assert gate_up_TF.is_contiguous()
        assert width % 2 == 0, width
        y_TF = self.empty(num_rows, width // 2, self.dtype)
        library = self.library
        call = library.silu_mul_few if num_rows <= NUM_ROWS_FEW else library.silu_mul
        call(
            *(self._code, gate_up_TF.data_ptr(), y_TF.data_ptr()),
            *(num_rows, width // 2, self._num_threads),
        )
        return y_TF

    def rope_and_store(
        self,
        qkv_TF: torch.Tensor,
        heads: HeadShape,
        cos_TA: torch.Tensor,
        sin_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        q_norm_A: torch.Tensor | None = None,
        k_norm_A: torch.Tensor | None = None,
        norm_eps: float = 0.0,
    ) -> torch.Tensor:
        half = heads.head_dim // 2
        norm_A = k_norm_A if q_norm_A is None else q_norm_A
        lacking = None
        if cos_TA.shape[1] != half:
            lacking = "heads that turn in part"
        elif norm_A is not None and norm_A.dtype is not self.dtype:
            lacking = "norms with float32 weights"
        if lacking is not None:
            return self._torch_for(lacking).rope_and_store(
                *(qkv_TF, heads, cos_TA, sin_TA, kv_PJGCA, batch),
                q_norm_A=q_norm_A,
                k_norm_A=k_norm_A,
                norm_eps=norm_eps,
            )
        num_rows, width = qkv_TF.shape
        row_stride, stride = qkv_TF.stride()
        assert qkv_TF.dtype is self.dtype, qkv_TF.dtype
        assert stride == 1, stride
        assert width == (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, width
        assert kv_PJGCA.shape[2] == heads.num_kv_heads, kv_PJGCA.shape
        assert values_of_row(kv_PJGCA) == heads.head_dim, kv_PJGCA.shape
        assert cos_TA.dtype is sin_TA.dtype is torch.float32
        assert cos_TA.shape == sin_TA.shape == (num_rows, half), cos_TA.shape
        assert cos_TA.is_contiguous()
        assert sin_TA.is_contiguous()
        assert batch.slot_T.shape == (num_rows,), batch.slot_T.shape
        kv_shape = self.kv_shape_address(kv_PJGCA)
        q_TF = self.empty(num_rows, heads.num_heads * heads.head_dim, self.dtype)
        q_THA = q_TF.view(num_rows, heads.num_heads, heads.head_dim)
        library = self.library
        call = library.rope_few if num_rows <= NUM_ROWS_FEW else library.rope
        call(
            *(self._code, qkv_TF.data_ptr(), row_stride, cos_TA.data_ptr(), sin_TA.data_ptr()),
            *(self._norm_address(q_norm_A, heads), self._norm_address(k_norm_A, heads), norm_eps),
            *(batch.slot_T.data_ptr(), kv_PJGCA.data_ptr(), kv_shape),
            *(heads.num_heads, q_THA.data_ptr(), num_rows, self._num_threads),
        )
        return q_THA

    def gelu_mul(self, gate_up_TF: torch.Tensor) -> torch.Tensor:
        return self._torch_for("gelu").gelu_mul(gate_up_TF)

    def clamped_swiglu(self, gate_up_TF: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
        return self._torch_for("clamped swiglu").clamped_swiglu(gate_up_TF, alpha, limit)

    def rotate(
        self, x_THA: torch.Tensor, cos_TA: torch.Tensor, sin_TA: torch.Tensor
    ) -> torch.Tensor:
        return self._torch_for("rotation alone").rotate(x_THA, cos_TA, sin_TA)

    def store_latent(
        self,
        latent_TA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        value_dim: int,
    ) -> None:
        kernels = self._torch_for("latent attention")
        kernels.store_latent(latent_TA, kv_PJGCA, batch, value_dim=value_dim)

    def _torch_for(self, what: str) -> TorchKernels:
        """The kernels that serve what the C library lacks; says so once."""
        if what not in self._lacking:
            self._lacking.add(what)
            logger.warning("no native kernels for %s: plain torch serves, slower", what)
        self._use_torch_threads(self._num_threads)
        return self._torch

    def _use_torch_threads(self, num_threads: int) -> None:
        """Torch has one thread until it must serve: after a job its others spin for milliseconds.

        They would hold the cores of this library's threads.
        """
        if num_threads != torch.get_num_threads():
            torch.set_num_threads(num_threads)

    def attention(
        self,
        q_THA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        *,
        scale: float,
        window: int | None,
        score_cap: float | None = None,
        sinks_H: torch.Tensor | None = None,
        value_dim: int | None = None,
    ) -> torch.Tensor:
        lacking = _lacking_for_attention(value_dim, score_cap)
        if lacking is None and sinks_H is not None:
            lacking = "attention sinks"
        if lacking is not None:
            return self._torch_for(lacking).attention(
                *(q_THA, kv_PJGCA, batch),
                scale=scale,
                window=window,
                score_cap=score_cap,
                sinks_H=sinks_H,
                value_dim=value_dim,
            )
        self._check_queries(q_THA, kv_PJGCA)
        kv_shape = self.kv_shape_address(kv_PJGCA)
        num_rows, num_heads, head_dim = q_THA.shape
        o_THA = self.empty(num_rows, num_heads * head_dim, self.dtype).view(q_THA.shape)
        table_BW = batch.block_table_BW
        self.library.attention(
            *(self._code, q_THA.data_ptr(), o_THA.data_ptr(), kv_PJGCA.data_ptr(), kv_shape),
            *(num_heads, table_BW.data_ptr(), table_BW.stride(0)),
            *(batch.query_start_B1.data_ptr(), batch.context_len_B.data_ptr()),
            *(len(batch.query_lens), window or 0, scale, self._num_threads),
        )
        return o_THA

    def attention_part(
        self,
        q_THA: torch.Tensor,
        kv_PJGCA: torch.Tensor,
        batch: StepBatch,
        keys: KeySpans,
        *,
        scale: float,
        window: int | None,
        score_cap: float | None = None,
        value_dim: int | None = None,
    ) -> AttentionPart:
        lacking = _lacking_for_attention(value_dim, score_cap)
        if lacking is not None:
            return self._torch_for(lacking).attention_part(
                *(q_THA, kv_PJGCA, batch, keys),
                scale=scale,
                window=window,
                score_cap=score_cap,
                value_dim=value_dim,
            )
        self._check_queries(q_THA, kv_PJGCA)
        assert len(keys.by_sequence) == len(batch.query_lens), keys.by_sequence
        kv_shape = self.kv_shape_address(kv_PJGCA)
        num_rows, num_heads, head_dim = q_THA.shape
        o_TF = self.empty(num_rows, num_heads * head_dim, torch.float32)
        log_sum_TH = self.empty(num_rows, num_heads, torch.float32)
        table_BW = batch.block_table_BW
        self.library.attention_part(
            *(self._code, q_THA.data_ptr(), o_TF.data_ptr(), log_sum_TH.data_ptr()),
            *(kv_PJGCA.data_ptr(), kv_shape, num_heads),
            *(table_BW.data_ptr(), table_BW.stride(0)),
            *(batch.query_start_B1.data_ptr(), batch.context_len_B.data_ptr()),
            *(keys.bound_X2.data_ptr(), keys.start_B1.data_ptr()),
            *(len(batch.query_lens), window or 0, scale, self._num_threads),
        )
        return AttentionPart(o_TF.view(q_THA.shape), log_sum_TH)

    def _check_queries(self, q_THA: torch.Tensor, kv_PJGCA: torch.Tensor) -> None:
        assert q_THA.dtype is self.dtype, q_THA.dtype
        assert q_THA.is_contiguous()
        assert q_THA.shape[2] == values_of_row(kv_PJGCA), (q_THA.shape, kv_PJGCA.shape)
        assert q_THA.shape[1] % kv_PJGCA.shape[2] == 0, (q_THA.shape, kv_PJGCA.shape)

    def empty(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        if num_rows * width < NUM_ELEMENTS_LARGE:
            return torch.empty((num_rows, width), dtype=dtype)
        return self._results.empty(num_rows * width, dtype).view(num_rows, width)

    def _norm_address(self, norm_A: torch.Tensor | None, heads: HeadShape) -> int | None:
        if norm_A is None:
            return None
        assert norm_A.dtype is self.dtype, norm_A.dtype
        assert norm_A.shape == (heads.head_dim,), norm_A.shape
        return norm_A.data_ptr()

    def kv_shape_address(self, kv_PJGCA: torch.Tensor) -> int:
        """Of the same structure for all layers of a pool; it stays valid until another pool's."""
        key = (kv_PJGCA.dtype, *kv_PJGCA.shape, *kv_PJGCA.stride())
        if key != self._kv_key:
            assert kv_PJGCA.dtype is self.dtype or is_scaled(kv_PJGCA), kv_PJGCA.dtype
            self._kv_key = key
            self._kv_shape = KvShape.of(kv_PJGCA)
        return ctypes.addressof(self._kv_shape)

    def fuse_attention(self, parts: AttentionParts) -> FusedAttention | None:
        norms = (parts.norm_D, parts.q_norm_A, parts.k_norm_A)
        is_plain = (
            all(norm is None or norm.dtype is self.dtype for norm in norms)
            and parts.rotary_dim == parts.heads.head_dim
            and parts.score_cap is None
            and parts.sinks_H is None
        )
        return NativeAttention(self, parts) if is_plain else None

    def fuse_mlp(self, parts: MlpParts) -> FusedMlp | None:
        return NativeMlp(self, parts) if parts.norm_D.dtype is self.dtype else None

    def fuse_layers(self, layers: Sequence[tuple[FusedAttention, FusedMlp]]) -> FusedLayers | None:
        native = [
            (attention, mlp)
            for attention, mlp in layers
            if isinstance(attention, NativeAttention) and isinstance(mlp, NativeMlp)
        ]
        assert len(native) == len(layers), "halves of these kernels"
        return NativeLayers(self, native)


def _lacking_for_attention(value_dim: int | None, score_cap: float | None) -> str | None:
    if value_dim is not None:
        return "latent attention"
    return None if score_cap is None else "capped attention scores"
