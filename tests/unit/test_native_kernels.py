"""The C library at every level of this CPU: right values, and the same bits however work is cut.

Shape suffixes: T tokens, D input features, F output features, H query heads, A head dim, P blocks
in the pool, J key then value, G KV heads, C slots in a block.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.kernels.interface import HeadShape
from engine.kernels.native_kernels import NativeKernels
from engine.kernels.native_library import NativeLibrary
from engine.kernels.torch_kernels import TorchKernels
from engine.kv_cache.batch import KeySpans, StepBatch
from engine.kv_cache.scaled_rows import LARGEST, scaled_rows, unscaled_rows

try:
    LIBRARY = NativeLibrary()
except OSError as error:  # plain torch serves where no compiler was found
    pytest.skip(str(error), allow_module_level=True)

LEVELS = LIBRARY.level_names()
BLOCK_SIZE_TOKENS = 16


@pytest.fixture(params=range(len(LEVELS)), ids=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    LIBRARY.use_level(request.param)
    yield request.param
    LIBRARY.use_level(len(LEVELS) - 1)


def batch_of(query_lens: tuple[int, ...], context_lens: tuple[int, ...], threads: int) -> StepBatch:
    """Sequences one after the other in the pool, each in blocks of its own."""
    widths = [-(-length // BLOCK_SIZE_TOKENS) for length in context_lens]
    table_BW = torch.zeros(len(widths), max(widths), dtype=torch.int32)
    first = 0
    for row, width in enumerate(widths):
        table_BW[row, :width] = torch.arange(first, first + width)
        first += width
    num_tokens = sum(query_lens)
    starts = [sum(query_lens[:index]) for index in range(len(query_lens) + 1)]
    return StepBatch(
        token_T=torch.zeros(num_tokens, dtype=torch.int64),
        position_T=torch.zeros(num_tokens, dtype=torch.int64),
        slot_T=torch.zeros(num_tokens, dtype=torch.int64),
        block_table_BW=table_BW,
        query_start_B1=torch.tensor(starts, dtype=torch.int32),
        context_len_B=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        num_threads=threads,
    )


def kernels_with(dtype: torch.dtype, num_threads: int) -> NativeKernels:
    kernels = NativeKernels(LIBRARY, dtype)
    kernels.begin_step(batch_of((1,), (1,), num_threads))
    return kernels


def random(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def largest_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Against the largest value, so that sums that cancel count as little as they weigh."""
    expected = expected.double()
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Of the largest value: a rounding of the result, and of sums in another order."""


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inner", "num_out"), [(40, 72), (576, 96), (1536, 80)])
def test_a_linear_layer_gives_the_product(dtype: torch.dtype, inner: int, num_out: int) -> None:
    x_TD = random(75, inner, dtype=dtype)
    weight_FD = random(num_out, inner, dtype=dtype)
    bias_F = random(num_out, dtype=dtype)
    kernels = kernels_with(dtype, num_threads=2)
    y_TF = kernels.linear(x_TD, kernels.pack_linear(weight_FD, bias_F))
    expected_TF = x_TD.double() @ weight_FD.double().T + bias_F.double()
    assert largest_error(y_TF, expected_TF) < TOLERANCE[dtype]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_no_rows_give_no_rows(dtype: torch.dtype) -> None:
    kernels = kernels_with(dtype, num_threads=2)
    packed = kernels.pack_linear(random(64, 40, dtype=dtype), None)
    x_TD = random(0, 40, dtype=dtype)
    assert (
        kernels.linear(x_TD, packed).shape == kernels.linear_float32(x_TD, packed).shape == (0, 64)
    )
    assert kernels.linear_silu_mul(x_TD, packed).shape == (0, 32)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("inner", [40, 576, 1536])
def test_a_row_has_the_same_bits_in_any_batch(dtype: torch.dtype, inner: int) -> None:
    x_TD = random(1111, inner, dtype=dtype)
    weight_FD = random(104, inner, dtype=dtype)
    kernels = kernels_with(dtype, num_threads=2)
    packed = kernels.pack_linear(weight_FD, None)
    y_TF = kernels.linear_float32(x_TD, packed)
    alone = kernels_with(dtype, num_threads=1)
    for start, end in ((0, 1), (3, 19), (30, 47), (500, 600), (1110, 1111)):
        assert torch.equal(alone.linear_float32(x_TD[start:end], packed), y_TF[start:end])


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("num_rows", "inner", "num_out"),
    [(3, 96, 320), (75, 96, 320), (300, 320, 320), (300, 576, 1280)],
)
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_gated_layer_has_the_bits_of_its_parts(
    dtype: torch.dtype, num_rows: int, inner: int, num_out: int, has_bias: bool
) -> None:
    x_TD = random(num_rows, inner, dtype=dtype)
    kernels = kernels_with(dtype, num_threads=2)
    bias_F = random(num_out, dtype=dtype) if has_bias else None
    packed = kernels.pack_linear(random(num_out, inner, dtype=dtype), bias_F)
    separate_TF = kernels.silu_mul(kernels.linear(x_TD, packed))
    assert torch.equal(kernels.linear_silu_mul(x_TD, packed), separate_TF)
    expected_TF = TorchKernels(torch.device("cpu")).silu_mul(kernels.linear(x_TD, packed))
    assert largest_error(separate_TF, expected_TF) < TOLERANCE[dtype]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [576, 80, 40])
def test_a_norm_adds_and_scales_as_torch_does(dtype: torch.dtype, dim: int) -> None:
    x_TD, residual_TD = random(20, dim, dtype=dtype), random(20, dim, dtype=dtype)
    weight_D = random(dim, dtype=dtype)
    kept_TD, expected_kept_TD = residual_TD.clone(), residual_TD.clone()
    y_TD = kernels_with(dtype, num_threads=2).add_rms_norm(x_TD, kept_TD, weight_D, 1e-5)
    torch_kernels = TorchKernels(torch.device("cpu"))
    expected_TD = torch_kernels.add_rms_norm(x_TD, expected_kept_TD, weight_D, 1e-5)
    assert torch.equal(kept_TD, expected_kept_TD)
    assert largest_error(y_TD, expected_TD) < TOLERANCE[dtype]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("head_dim", [64, 80])
def test_attention_gives_the_softmax_however_the_prompt_is_cut(
    dtype: torch.dtype, window: int | None, head_dim: int
) -> None:
    num_heads, num_kv_heads, length = 6, 2, 601
    num_blocks = -(-length // BLOCK_SIZE_TOKENS)
    q_THA = random(length, num_heads, head_dim, dtype=dtype)
    kv_PJGCA = random(num_blocks, 2, num_kv_heads, BLOCK_SIZE_TOKENS, head_dim, dtype=dtype)
    kernels = kernels_with(dtype, num_threads=2)
    alone = kernels_with(dtype, num_threads=1)

    def attended(on: NativeKernels, start: int, end: int) -> torch.Tensor:
        batch = batch_of((end - start,), (end,), 1)
        return on.attention(q_THA[start:end], kv_PJGCA, batch, scale=0.3, window=window)

    o_THA = attended(kernels, 0, length)
    for start, end in ((0, 1), (0, 33), (250, 260), (255, 514), (600, 601)):
        assert torch.equal(attended(alone, start, end), o_THA[start:end])

    k_GSA, v_GSA = (
        kv_PJGCA[:, side].transpose(0, 1).flatten(1, 2)[:, :length].double() for side in (0, 1)
    )
    group = num_heads // num_kv_heads
    k_HSA, v_HSA = k_GSA.repeat_interleave(group, 0), v_GSA.repeat_interleave(group, 0)
    distance_TS = torch.arange(length).unsqueeze(1) - torch.arange(length)
    is_seen_TS = (distance_TS >= 0) & (distance_TS < (window or length))
    score_HTS = 0.3 * q_THA.double().transpose(0, 1) @ k_HSA.transpose(1, 2)
    expected_HTA = score_HTS.masked_fill(~is_seen_TS, -torch.inf).softmax(-1) @ v_HSA
    assert largest_error(o_THA.transpose(0, 1), expected_HTA) < TOLERANCE[dtype]


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attention_of_a_sequence_has_the_same_bits_in_any_batch(dtype: torch.dtype) -> None:
    """Prompts between decoding sequences, one of them long enough to be cut along its context."""
    lens, contexts = (1, 40, 1, 130), (900, 300, 17, 130)
    num_blocks = sum(-(-length // BLOCK_SIZE_TOKENS) for length in contexts)
    q_THA = random(sum(lens), 9, 64, dtype=dtype)
    kv_PJGCA = random(num_blocks, 2, 3, BLOCK_SIZE_TOKENS, 64, dtype=dtype)
    together = batch_of(lens, contexts, 2)
    o_THA = kernels_with(dtype, 2).attention(q_THA, kv_PJGCA, together, scale=0.125, window=None)
    start = first = 0
    for num_queries, context in zip(lens, contexts, strict=True):
        end, width = start + num_queries, -(-context // BLOCK_SIZE_TOKENS)
        for num_threads in (1, 2):
            alone_THA = kernels_with(dtype, num_threads).attention(
                q_THA[start:end],
                kv_PJGCA[first : first + width],
                batch_of((num_queries,), (context,), num_threads),
                scale=0.125,
                window=None,
            )
            assert torch.equal(alone_THA, o_THA[start:end])
        start, first = end, first + width


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("scaled", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 20])
def test_rows_with_scales_are_attended_as_what_they_stand_for(
    scaled: torch.dtype, dtype: torch.dtype, head_dim: int
) -> None:
    lens, contexts = (1, 40, 130), (700, 300, 130)
    num_blocks = sum(-(-length // BLOCK_SIZE_TOKENS) for length in contexts)
    q_THA = random(sum(lens), 6, head_dim, dtype=dtype)
    kv_PJGCA = random(num_blocks, 2, 3, BLOCK_SIZE_TOKENS, head_dim, dtype=torch.float32)
    rows_PJGCA = scaled_rows(kv_PJGCA, (head_dim,), scaled).view(scaled)
    batch = batch_of(lens, contexts, 2)
    kernels = kernels_with(dtype, 2)
    o_THA, expected_THA = (
        kernels.attention(q_THA, kv, batch, scale=0.125, window=200)
        for kv in (rows_PJGCA, unscaled_rows(rows_PJGCA, (head_dim,), dtype))
    )
    assert torch.equal(o_THA, expected_THA)

    keys = KeySpans.of([[range(30, 300), range(520, 530)], [range(1)], [range(100, 130)]])
    part, expected = (
        kernels.attention_part(q_THA, kv, batch, keys, scale=0.125, window=None)
        for kv in (rows_PJGCA, unscaled_rows(rows_PJGCA, (head_dim,), dtype))
    )
    assert torch.equal(part.o_THA, expected.o_THA)
    assert torch.equal(part.log_sum_TH, expected.log_sum_TH)


@pytest.mark.usefixtures("level")
@pytest.mark.parametrize("scaled", LARGEST, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("head_dim", [64, 20])
def test_rows_are_scaled_to_the_bytes_of_the_reference(
    scaled: torch.dtype, dtype: torch.dtype, head_dim: int
) -> None:
    """Of any size, and of none; ties, zeros, and what is not finite."""
    heads = HeadShape(1, 2, head_dim)
    num_tokens, num_out = 400, 5 * head_dim
    size_T1 = torch.logspace(-44, 37, num_tokens).unsqueeze(1)
    qkv_TF = (random(num_tokens, num_out, dtype=torch.float32) * size_T1).to(dtype)
    values_TGA = qkv_TF.view(num_tokens, 5, head_dim)[:, 3:]
    largest = LARGEST[scaled]
    values_TGA[0] = torch.linspace(-largest, largest, head_dim).round() / 2
    values_TGA[1] = torch.arange(head_dim) * 0.5
    values_TGA[1, :, 0] = largest
    values_TGA[2] = 0
    for token, bad in enumerate((math.inf, -math.inf, math.nan), 3):
        values_TGA[token, 1, head_dim - 1] = bad
    batch = replace(batch_of((1,), (1,), 1), slot_T=torch.randperm(num_tokens))
    kv_PJGCA = torch.zeros(25, 2, 2, BLOCK_SIZE_TOKENS, head_dim + 4, dtype=scaled)
    angle_TA = torch.zeros(num_tokens, head_dim // 2)
    kernels = kernels_with(dtype, 2)
    kernels.rope_and_store(qkv_TF, heads, angle_TA.cos(), angle_TA.sin(), kv_PJGCA, batch)
    stored_TJGX = kv_PJGCA.permute(0, 3, 1, 2, 4).flatten(0, 1)[batch.slot_T]
    rows_TGX = scaled_rows(qkv_TF.view(num_tokens, 5, head_dim)[:, 1:], (head_dim,), scaled)
    keys_TGX, values_TGX = rows_TGX.split(2, 1)
    assert torch.equal(stored_TJGX[:, 1].view(torch.uint8), values_TGX)
    keys_TGA, expected_TGA = (  # a rotation by nothing may turn -0 into 0
        unscaled_rows(rows_X.view(scaled), (head_dim,), torch.float32)
        for rows_X in (stored_TJGX[:, 0], keys_TGX)
    )
    torch.testing.assert_close(keys_TGA, expected_TGA, rtol=0, atol=0)
