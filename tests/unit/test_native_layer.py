"""The halves of a layer in one call: the bits of the separate operations, at every level.

Shape suffixes: T tokens, D model dim, F features, A one a rotated pair, P blocks in the pool, J key
then value, G KV heads, C slots in a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from engine.kernels.interface import AttentionParts, HeadShape, MlpParts
from engine.kernels.native_kernels import NativeKernels
from engine.kernels.native_library import NativeLibrary
from engine.kv_cache.batch import StepBatch
from engine.kv_cache.scaled_rows import scaled_rows

try:
    LIBRARY = NativeLibrary()
except OSError as error:  # plain torch serves where no compiler was found
    pytest.skip(str(error), allow_module_level=True)

LEVELS = LIBRARY.level_names()
BLOCK_SIZE_TOKENS = 16
EPS = 1e-5
HEADS = HeadShape(num_heads=6, num_kv_heads=2, head_dim=32)
BATCHES = {
    "one": ((1,), (300,)),
    "few": ((1, 1, 5), (40, 17, 21)),
    "many": ((150, 1, 33), (150, 90, 70)),
}
"""Query and context lengths of each sequence."""


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    LIBRARY.use_level(request.param)
    yield request.param
    LIBRARY.use_level(len(LEVELS) - 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """Random tensors of one dtype, from a seed of their own."""

    dtype: torch.dtype
    generator: torch.Generator

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(dtype=request.param, generator=torch.Generator().manual_seed(7))


def batch_of(query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> StepBatch:
    """Sequences one after the other in the pool; the queries are the last tokens of each."""
    widths = [-(-length // BLOCK_SIZE_TOKENS) for length in context_lens]
    table_BW = torch.zeros(len(widths), max(widths), dtype=torch.int32)
    slots: list[int] = []
    first = 0
    for row, (width, num_queries, length) in enumerate(
        zip(widths, query_lens, context_lens, strict=True)
    ):
        table_BW[row, :width] = torch.arange(first, first + width)
        start = first * BLOCK_SIZE_TOKENS + length
        slots += range(start - num_queries, start)
        first += width
    starts = [sum(query_lens[:index]) for index in range(len(query_lens) + 1)]
    return StepBatch(
        token_T=torch.zeros(len(slots), dtype=torch.int64),
        position_T=torch.zeros(len(slots), dtype=torch.int64),
        slot_T=torch.tensor(slots, dtype=torch.int64),
        block_table_BW=table_BW,
        query_start_B1=torch.tensor(starts, dtype=torch.int32),
        context_len_B=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        num_threads=2,
    )


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(
    ("dim", "scaled"),
    [(96, None), (40, None), (96, torch.int8), (40, torch.float8_e4m3fn)],
    ids=str,
)
@pytest.mark.parametrize("has_all", [False, True])
def test_the_attention_half_has_the_bits_of_its_operations(
    case: Case,
    batch: tuple[tuple[int, ...], tuple[int, ...]],
    dim: int,
    scaled: torch.dtype | None,
    has_all: bool,
) -> None:
    """With and without biases, norms of heads, a window, and something to add first."""
    step = batch_of(*batch)
    kernels = NativeKernels(LIBRARY, case.dtype)
    kernels.begin_step(step)
    num_rows, q_width = step.slot_T.shape[0], HEADS.num_heads * HEADS.head_dim
    qkv_width = q_width + 2 * HEADS.num_kv_heads * HEADS.head_dim
    norms_A = [case.random(HEADS.head_dim) if has_all else None for _ in range(2)]
    bias_F = case.random(qkv_width) if has_all else None
    parts = AttentionParts(
        norm_D=case.random(dim),
        norm_eps=EPS,
        qkv=kernels.pack_linear(case.random(qkv_width, dim), bias_F),
        heads=HEADS,
        rotary_dim=HEADS.head_dim,
        q_norm_A=norms_A[0],
        k_norm_A=norms_A[1],
        head_norm_eps=2 * EPS,
        scale=0.3,
        window=50 if has_all else None,
        score_cap=None,
        sinks_H=None,
        output=kernels.pack_linear(case.random(dim, q_width), None),
    )
    added_TD = case.random(num_rows, dim) if has_all else None
    residual_TD = case.random(num_rows, dim)
    angle_TA = torch.randn(num_rows, HEADS.head_dim // 2, generator=case.generator)
    num_blocks = int(step.block_table_BW.max()) + 1
    kv_PJGCA = case.random(num_blocks, 2, HEADS.num_kv_heads, BLOCK_SIZE_TOKENS, HEADS.head_dim)
    if scaled is not None:
        kv_PJGCA = scaled_rows(kv_PJGCA, (HEADS.head_dim,), scaled).view(scaled)
    fused_residual_TD, fused_kv_PJGCA = residual_TD.clone(), kv_PJGCA.clone()

    if added_TD is None:
        x_TD = kernels.rms_norm(residual_TD, parts.norm_D, EPS)
    else:
        x_TD = kernels.add_rms_norm(added_TD, residual_TD, parts.norm_D, EPS)
    q_THA = kernels.rope_and_store(
        kernels.linear(x_TD, parts.qkv),
        HEADS,
        angle_TA.cos(),
        angle_TA.sin(),
        kv_PJGCA,
        step,
        q_norm_A=parts.q_norm_A,
        k_norm_A=parts.k_norm_A,
        norm_eps=parts.head_norm_eps,
    )
    o_THA = kernels.attention(q_THA, kv_PJGCA, step, scale=parts.scale, window=parts.window)
    expected_TD = kernels.linear(o_THA.flatten(1), parts.output)

    fused = kernels.fuse_attention(parts)
    assert fused is not None
    y_TD = fused(added_TD, fused_residual_TD, angle_TA.cos(), angle_TA.sin(), fused_kv_PJGCA)
    assert torch.equal(y_TD, expected_TD)
    assert torch.equal(fused_residual_TD, residual_TD)
    assert torch.equal(fused_kv_PJGCA.view(torch.uint8), kv_PJGCA.view(torch.uint8))


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("num_rows", [1, 20, 150])
@pytest.mark.parametrize("width", [320, 72])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_mlp_half_has_the_bits_of_its_operations(
    case: Case, num_rows: int, width: int, has_bias: bool
) -> None:
    dim = 96
    kernels = NativeKernels(LIBRARY, case.dtype)
    kernels.begin_step(batch_of((num_rows,), (num_rows,)))
    bias_F = case.random(2 * width) if has_bias else None
    parts = MlpParts(
        norm_D=case.random(dim),
        norm_eps=EPS,
        gate_up=kernels.pack_linear(case.random(2 * width, dim), bias_F),
        down=kernels.pack_linear(case.random(dim, width), None),
    )
    added_TD, residual_TD = case.random(num_rows, dim), case.random(num_rows, dim)
    fused_residual_TD = residual_TD.clone()

    x_TD = kernels.add_rms_norm(added_TD, residual_TD, parts.norm_D, EPS)
    expected_TD = kernels.linear(kernels.linear_silu_mul(x_TD, parts.gate_up), parts.down)

    fused = kernels.fuse_mlp(parts)
    assert fused is not None
    assert torch.equal(fused(added_TD, fused_residual_TD), expected_TD)
    assert torch.equal(fused_residual_TD, residual_TD)


def test_what_the_library_lacks_is_not_fused(case: Case) -> None:
    kernels = NativeKernels(LIBRARY, case.dtype)
    linear = kernels.pack_linear(case.random(32, 32), None)
    wide_D = torch.ones(32, dtype=torch.float64)
    assert (
        kernels.fuse_mlp(MlpParts(norm_D=wide_D, norm_eps=EPS, gate_up=linear, down=linear)) is None
    )
    plain = AttentionParts(
        norm_D=case.random(32),
        norm_eps=EPS,
        qkv=linear,
        heads=HEADS,
        rotary_dim=HEADS.head_dim,
        q_norm_A=None,
        k_norm_A=None,
        head_norm_eps=EPS,
        scale=1.0,
        window=None,
        score_cap=None,
        sinks_H=None,
        output=linear,
    )
    assert kernels.fuse_attention(plain) is not None
    for parts in (
        replace(plain, rotary_dim=16),
        replace(plain, score_cap=30.0),
        replace(plain, sinks_H=case.random(6)),
        replace(plain, norm_D=wide_D),
        replace(plain, q_norm_A=wide_D),
    ):
        assert kernels.fuse_attention(parts) is None
