"""Attention to any partition of a context adds up to attention to the whole.

Shape suffixes: T tokens, H query heads, A head dim, P blocks in the pool, J key then value, G KV
heads, C slots in a block.
"""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.kernels.attention_part import AttentionPart
from engine.kernels.interface import Kernels
from engine.kernels.native_kernels import NativeKernels
from engine.kernels.native_library import NativeLibrary
from engine.kernels.torch_kernels import TorchKernels
from engine.kv_cache.batch import KeySpans, StepBatch
from tests.unit.test_native_kernels import BLOCK_SIZE_TOKENS, batch_of

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 24
MAX_CONTEXT_TOKENS = 700
NUM_PARTS = 3
TORCH = TorchKernels(torch.device("cpu"))
try:
    LIBRARY = NativeLibrary()
except OSError:  # plain torch serves where no compiler was found
    LEVELS = []
else:
    LEVELS = LIBRARY.level_names()


@dataclass(frozen=True)
class Form:
    """What a family adds to plain attention."""

    window: int | None = None
    score_cap: float | None = None
    has_sinks: bool = False
    is_latent: bool = False


FORMS = {
    "plain": Form(),
    "window": Form(window=100),
    "capped": Form(score_cap=2.0),
    "capped-window": Form(score_cap=2.0, window=300),
    "sinks": Form(has_sinks=True),
    "latent": Form(is_latent=True),
}


def kernels_of(name: str, dtype: torch.dtype) -> Kernels:
    if name == "torch":
        return TORCH
    LIBRARY.use_level(LEVELS.index(name))
    return NativeKernels(LIBRARY, dtype)


@dataclass(frozen=True)
class Step:
    """Sequences whose contexts are cut; each piece of a context belongs to a part."""

    query_lens: tuple[int, ...]
    pieces: tuple[tuple[tuple[range, int], ...], ...]

    @property
    def context_lens(self) -> tuple[int, ...]:
        return tuple(pieces[-1][0].stop for pieces in self.pieces)

    def spans(self, part: int) -> list[list[range]]:
        return [[span for span, of in pieces if of == part] for pieces in self.pieces]


@st.composite
def steps(draw: st.DrawFn) -> Step:
    queries, sequences = [], []
    for _ in range(draw(st.integers(1, 3))):
        context = draw(st.integers(1, MAX_CONTEXT_TOKENS))
        queries.append(draw(st.integers(1, min(context, 300))))
        cuts = draw(st.lists(st.integers(1, max(1, context - 1)), max_size=6, unique=True))
        bounds = sorted({0, context, *cuts})
        sequences.append(
            tuple((range(*ends), draw(st.integers(0, NUM_PARTS - 1))) for ends in pairwise(bounds))
        )
    return Step(tuple(queries), tuple(sequences))


def only(kv_PJGCA: torch.Tensor, batch: StepBatch, spans: list[list[range]]) -> torch.Tensor:
    """The pool where nothing but these positions is written: NaN elsewhere."""
    written = torch.full_like(kv_PJGCA, torch.nan)
    for blocks_W, sequence in zip(batch.block_table_BW, spans, strict=True):
        for span in sequence:
            position = torch.arange(span.start, span.stop)
            block, slot = blocks_W[position // BLOCK_SIZE_TOKENS], position % BLOCK_SIZE_TOKENS
            written[block, :, :, slot] = kv_PJGCA[block, :, :, slot]
    return written


NATIVE_FORMS = ("window", "sinks")  # plain torch serves the others


@pytest.mark.parametrize(
    ("name", "form"),
    [("torch", form) for form in FORMS]
    + [(level, form) for level in LEVELS for form in NATIVE_FORMS],
)
@settings(max_examples=15, deadline=None)
@given(step=steps(), seed=st.integers(0, 1000))
def test_parts_add_up_to_the_whole(name: str, form: str, step: Step, seed: int) -> None:
    has = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    q_THA = torch.randn(sum(step.query_lens), NUM_HEADS, HEAD_DIM, generator=generator)
    batch = batch_of(step.query_lens, step.context_lens, 2)
    num_blocks = sum(-(-length // BLOCK_SIZE_TOKENS) for length in step.context_lens)
    num_sides, num_kv_heads = (1, 1) if has.is_latent else (2, NUM_KV_HEADS)
    shape = (num_blocks, num_sides, num_kv_heads, BLOCK_SIZE_TOKENS, HEAD_DIM)
    kv_PJGCA = torch.randn(shape, generator=generator)
    sinks_H = torch.randn(NUM_HEADS, generator=generator) if has.has_sinks else None
    value_dim = HEAD_DIM - 8 if has.is_latent else None

    def part(index: int) -> AttentionPart:
        spans = step.spans(index)
        return kernels.attention_part(
            *(q_THA, only(kv_PJGCA, batch, spans), batch, KeySpans.of(spans)),
            scale=0.3,
            window=has.window,
            score_cap=has.score_cap,
            value_dim=value_dim,
        )

    kernels = kernels_of(name, torch.float32)
    kernels.begin_step(batch)
    whole = part(0)
    for index in range(1, NUM_PARTS):
        whole.add(part(index))
    if sinks_H is not None:
        whole.add_sinks(sinks_H)
    expected_THA = TORCH.attention(
        *(q_THA, kv_PJGCA, batch),
        scale=0.3,
        window=has.window,
        score_cap=has.score_cap,
        sinks_H=sinks_H,
        value_dim=value_dim,
    )
    assert torch.isfinite(whole.log_sum_TH).all()
    torch.testing.assert_close(whole.o_THA, expected_THA, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("window", [None, 100])
def test_parts_in_bfloat16_add_up_to_the_whole(level: str, window: int | None) -> None:
    generator = torch.Generator().manual_seed(3)
    queries, context = 200, 600
    batch = batch_of((queries,), (context,), 2)
    q_THA = torch.randn(queries, NUM_HEADS, 64, generator=generator).bfloat16()
    num_blocks = -(-context // BLOCK_SIZE_TOKENS)
    kv_PJGCA = torch.randn(
        num_blocks, 2, NUM_KV_HEADS, BLOCK_SIZE_TOKENS, 64, generator=generator
    ).bfloat16()
    kernels = kernels_of(level, torch.bfloat16)
    kernels.begin_step(batch)
    expected_THA = kernels.attention(q_THA, kv_PJGCA, batch, scale=0.2, window=window)
    first, second = (
        kernels.attention_part(
            q_THA, kv_PJGCA, batch, KeySpans.of([spans]), scale=0.2, window=window
        )
        for spans in ([range(437), range(513, 550)], [range(437, 513), range(550, 600)])
    )
    first.add(second)
    error = (first.o_THA - expected_THA.float()).abs().max() / expected_THA.float().abs().max()
    assert error < 2**-7


def test_a_query_that_sees_nothing_of_any_part_is_zero() -> None:
    nothing = AttentionPart(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf))
    nothing.add(AttentionPart(torch.zeros(2, 3, 4), torch.full((2, 3), -torch.inf)))
    assert torch.equal(nothing.o_THA, torch.zeros(2, 3, 4))
    assert (nothing.log_sum_TH == -torch.inf).all()
