"""Rows at lower precision: how far a value moves, where its scale stands, what attention reads.

Shape suffixes: A dims of a vector, X bytes of a row, T tokens, H query heads, J key then value,
P blocks, G KV heads, C slots in a block.
"""

import math
import struct
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.kernels.interface import HeadShape
from engine.kernels.torch_kernels import TorchKernels
from engine.kv_cache.batch import KeySpans
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import TORCH_DTYPES, KvPool
from engine.kv_cache.scaled_rows import LARGEST, scaled_rows, unscaled_rows, values_of_row
from tests.unit.test_native_kernels import batch_of, random

LAYOUT = KvLayout(num_layers=2, num_kv_heads=3, head_dim=64, block_size_tokens=16, dtype="int8")
DTYPES = ("int8", "fp8")


def round_trip(x_A: torch.Tensor, name: str, spans: tuple[int, ...] | None = None) -> torch.Tensor:
    dtype = TORCH_DTYPES[name]
    spans = spans or (x_A.shape[-1],)
    row_X = scaled_rows(x_A, spans, dtype)
    assert row_X.shape[-1] == x_A.shape[-1] + 4 * len(spans)
    return unscaled_rows(row_X.view(dtype), spans, torch.float32)


def largest_steps(x_A: torch.Tensor, name: str) -> torch.Tensor:
    """How far each value may move: half of the distance between its neighbours."""
    scale_1 = x_A.abs().amax(-1, keepdim=True) / LARGEST[TORCH_DTYPES[name]]
    if name == "int8":
        return (scale_1 / 2).expand_as(x_A)
    # e4m3 has three bits behind the first one, and 2^-9 between the smallest numbers.
    return torch.maximum(x_A.abs() * 2**-4, scale_1 * 2**-10)


@pytest.mark.parametrize("name", DTYPES)
@given(
    values=st.lists(st.floats(-(2.0**126), 2.0**126, width=32), min_size=1, max_size=70),
    exponent=st.integers(-100, 0),
)
def test_no_value_moves_by_more_than_half_a_step(
    name: str, values: list[float], exponent: int
) -> None:
    values += [0.0] * (-len(values) % 4)
    x_A = torch.tensor(values, dtype=torch.float64).mul(2.0**exponent).float()
    error_A = (round_trip(x_A, name).double() - x_A.double()).abs()
    step_A = largest_steps(x_A.double(), name)
    flushed = LARGEST[TORCH_DTYPES[name]] * torch.finfo(torch.float32).tiny
    if x_A.abs().max() < flushed * (1 + 1e-6):
        assert error_A.max() <= x_A.abs().max()
    else:
        assert (error_A <= step_A * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", DTYPES)
def test_a_row_that_was_read_back_is_written_as_it_was(name: str) -> None:
    x_A = random(200, 64, dtype=torch.float32)
    once = round_trip(x_A, name)
    torch.testing.assert_close(round_trip(once, name), once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", DTYPES)
def test_zeros_stay_zeros_and_the_largest_value_stays(name: str) -> None:
    x_A = torch.stack((torch.zeros(8), torch.full((8,), 1e-41), torch.full((8,), 3e38)))
    back_A = round_trip(x_A, name)
    assert torch.equal(back_A[:2], torch.zeros(2, 8))
    torch.testing.assert_close(back_A[2], x_A[2])


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_span_that_is_not_finite_is_not_finite_throughout(name: str, bad: float) -> None:
    """What is broken is seen, as it would be at full precision; other spans are untouched."""
    x_A = torch.ones(2, 8)
    x_A[0, 3] = bad
    back_A = round_trip(x_A, name, spans=(4, 4))
    assert back_A[0, :4].isnan().all()
    assert torch.equal(back_A[0, 4:], torch.ones(4))
    assert torch.equal(back_A[1], torch.ones(8))


def test_a_scale_stands_behind_its_row() -> None:
    x_A = torch.tensor([2.0, -127.0, 63.4, 0.0]) / 8
    row_X = bytes(scaled_rows(x_A, (4,), torch.int8).tolist())
    assert row_X == struct.pack("<4bf", 2, -127, 63, 0, 1 / 8)
    x_A = torch.tensor([448.0, -1.0, 0.5, 3.3]) / 4
    row_X = bytes(scaled_rows(x_A, (4,), torch.float8_e4m3fn).tolist())
    assert row_X == struct.pack("<4Bf", 0x7E, 0xB8, 0x30, 0x45, 1 / 4)


def test_a_latent_vectors_parts_have_scales_of_their_own() -> None:
    """The rotated part is often much larger, and would leave the other a few steps."""
    latent_A, rotated_A = random(1, 32, dtype=torch.float32)[0], torch.full((8,), 1000.0)
    back_A = round_trip(torch.cat((latent_A, rotated_A)), "int8", spans=(32, 8))
    assert (back_A[:32] - latent_A).abs().max() <= latent_A.abs().max() / 254 * (1 + 1e-5)


def test_bytes_of_a_token_count_values_and_scales() -> None:
    assert LAYOUT.bytes_per_cell == 2 * (64 + 4)
    assert LAYOUT.bytes_per_token == 2 * 3 * 2 * (64 + 4)
    latent = replace(LAYOUT, num_parts=1, num_kv_heads=1, head_dim=576, dtype="fp8")
    assert latent.bytes_per_cell == 576 + 2 * 4
    with pytest.raises(ValueError, match=r"fp8 needs heads of a multiple of 4 dims.* head_dim 6"):
        replace(LAYOUT, head_dim=6, dtype="fp8")


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torch_attends_to_what_the_rows_stand_for(name: str, dtype: torch.dtype) -> None:
    """Prompts and decoding sequences, over keys and values that the kernels have stored."""
    heads = HeadShape(6, 3, 64)
    batch = batch_of((40, 1, 7), (40, 90, 30), 1)
    qkv_TF = random(48, 12 * 64, dtype=dtype)
    angle_TA = random(48, 32, dtype=torch.float32)
    batch = replace(batch, slot_T=torch.arange(48))
    kernels = TorchKernels(torch.device("cpu"))
    kernels.begin_step(batch)
    with KvPool(replace(LAYOUT, dtype=name), 11, torch.device("cpu")) as pool:
        rows_PJGCA = pool.layer(1)
        q_THA = kernels.rope_and_store(
            qkv_TF, heads, angle_TA.cos(), angle_TA.sin(), rows_PJGCA, batch
        )
        assert values_of_row(rows_PJGCA) == 64
        kv_PJGCA = unscaled_rows(rows_PJGCA, (64,), dtype)
        o_THA = kernels.attention(q_THA, rows_PJGCA, batch, scale=0.125, window=None)
        expected_THA = kernels.attention(q_THA, kv_PJGCA, batch, scale=0.125, window=None)
        stored_TGA = kv_PJGCA[:3, 1].transpose(1, 2).flatten(0, 1)
        assert not pool.layer(0).view(torch.uint8).any()
    assert torch.equal(o_THA, expected_THA)
    value_TGA = qkv_TF.view(48, 12, 64)[:, 9:]
    error_TGA = (stored_TGA.double() - value_TGA.double()).abs()
    rounding = 0 if dtype is torch.float32 else value_TGA.double().abs() * 2**-8
    assert (error_TGA <= largest_steps(value_TGA.double(), name) * (1 + 1e-5) + rounding).all()


@pytest.mark.parametrize("name", DTYPES)
def test_torch_attends_to_a_latent_vector_of_two_scales(name: str) -> None:
    batch = replace(batch_of((20, 1), (20, 1), 1), slot_T=torch.tensor([*range(20), 32]))
    layout = replace(LAYOUT, num_parts=1, num_kv_heads=1, head_dim=40, dtype=name)
    latent_TA = random(21, 40, dtype=torch.float32)
    latent_TA[:, 32:] *= 100
    q_THA = random(21, 4, 40, dtype=torch.float32)
    kernels = TorchKernels(torch.device("cpu"))
    kernels.begin_step(batch)
    with KvPool(layout, 3, torch.device("cpu")) as pool:
        rows_PJGCA = pool.layer(0)
        kernels.store_latent(latent_TA, rows_PJGCA, batch, value_dim=32)
        kv_PJGCA = unscaled_rows(rows_PJGCA, (32, 8), torch.float32)
        o_THA, expected_THA = (
            kernels.attention(q_THA, kv, batch, scale=0.1, window=None, value_dim=32)
            for kv in (rows_PJGCA, kv_PJGCA)
        )
        keys = KeySpans.of([[range(3, 9)], [range(1)]])
        part, expected = (
            kernels.attention_part(q_THA, kv, batch, keys, scale=0.1, window=None, value_dim=32)
            for kv in (rows_PJGCA, kv_PJGCA)
        )
    assert torch.equal(part.o_THA, expected.o_THA)
    assert o_THA.shape == (21, 4, 32)
    assert torch.equal(o_THA, expected_THA)
    error_A = (kv_PJGCA[2, 0, 0, 0, :32] - latent_TA[20, :32]).abs()
    assert (error_A <= latent_TA[20, :32].abs().max() * (2**-4 if name == "fp8" else 1 / 250)).all()
