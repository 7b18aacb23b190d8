"""The sampler against naive references, its statistics, and its independence of the batch."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import SamplingParams
from engine.sampling.draw import argmax, draw
from engine.sampling.history import SamplerState, TokenHistory
from engine.sampling.sampler import SampleRow, sample
from engine.sampling.uniform import seed_tensor, uniform

VOCAB = 300
EOS = frozenset({7})
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def row(params: SamplingParams, *, prompt=(), output=(), position=None) -> SampleRow:
    state = SamplerState(
        params, prompt_token_ids=prompt, output_token_ids=output, eos_token_ids=EOS
    )
    return SampleRow(
        state, len(prompt) + len(output) if position is None else position, len(output)
    )


def logits(num_rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn((num_rows, vocab), generator=torch.Generator().manual_seed(seed)) * 3


def splitmix_uniform(seed: int, position: int) -> float:
    """The hash in plain Python integers."""
    mask, increment = (1 << 64) - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = mix((seed + increment) & mask)
    return (mix((state + increment * (position + 1)) & mask) >> 11) * 2.0**-53


def kept_tokens(scaled: list[float], params: SamplingParams) -> dict[int, float]:
    """Naive min_p, top_k, top_p in this order: token -> probability, renormalised."""
    top = max(scaled)
    weights = {token: math.exp(value - top) for token, value in enumerate(scaled)}
    if params.min_p > 0:
        weights = {t: w for t, w in weights.items() if w >= params.min_p}
    order = sorted(weights, key=lambda t: -weights[t])
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, mass, nucleus = sum(weights[t] for t in order), 0.0, []
        for token in order:
            nucleus.append(token)
            mass += weights[token]
            if mass >= params.top_p * total - 1e-9:
                break
        order = nucleus
    total = sum(weights[t] for t in order)
    return {token: weights[token] / total for token in order}


def naive_draw(raw: list[float], params: SamplingParams, u: float) -> tuple[int, float]:
    """The drawn token, and how far u was from the border to another one."""
    kept = kept_tokens([value / params.temperature for value in raw], params)
    mass = 0.0
    for token in sorted(kept):
        mass += kept[token]
        if u < mass:
            return token, min(mass - u, u - (mass - kept[token]))
    return max(kept), 0.0


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31))
def test_uniform_is_the_documented_hash(seed, position):
    u_B = uniform(seed_tensor([seed], CPU), torch.tensor([position]))
    assert u_B.item() == splitmix_uniform(seed, position)


def test_uniform_is_uniform_over_positions_and_over_seeds():
    many = 100_000
    over_positions = uniform(seed_tensor([5], CPU), torch.arange(many))
    over_seeds = uniform(torch.arange(many), torch.tensor([17]))
    for u in (over_positions, over_seeds):
        counts = torch.histc(u.float(), bins=50, min=0, max=1)
        chi_squared = ((counts - many / 50) ** 2 / (many / 50)).sum().item()
        assert chi_squared < 95  # 49 degrees of freedom: p = 1e-4
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1].item()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_uniform_is_the_same_on_cuda():
    seeds = seed_tensor([0, 1, 2**63, 2**64 - 1] * 250, CPU)
    positions = torch.arange(1000)
    on_cuda = uniform(seeds.cuda(), positions.cuda()).cpu()
    assert torch.equal(on_cuda, uniform(seeds, positions))


def test_argmax_takes_the_first_maximum():
    x = torch.tensor([[0.0, 3.0, 3.0], [5.0, 1.0, 5.0]])
    assert argmax(x).tolist() == [1, 0]


PARAM_SETS = [
    SamplingParams(temperature=0.7),
    SamplingParams(temperature=1.5, top_k=5),
    SamplingParams(temperature=1.0, top_k=1),
    SamplingParams(temperature=1.0, top_p=0.5),
    SamplingParams(temperature=0.9, top_p=0.95),
    SamplingParams(temperature=1.3, min_p=0.1),
    SamplingParams(temperature=1.0, top_k=40, top_p=0.8, min_p=0.02),
    SamplingParams(temperature=2.0, top_k=VOCAB + 5, top_p=0.999),
]


@pytest.mark.parametrize("params", PARAM_SETS, ids=str)
def test_draw_equals_the_naive_reference(params):
    x_BV = logits(64, seed=3)
    positions = list(range(64))
    drawn = draw(x_BV.clone(), [params] * 64, positions).tolist()
    for index, token in enumerate(drawn):
        u = splitmix_uniform(params.seed, positions[index])
        expected, margin = naive_draw(x_BV[index].tolist(), params, u)
        assert token == expected or margin < 1e-6


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from([1, 2, 127, 128, 129, 300]),
    st.floats(0.05, 3),
    st.integers(0, 8),
    st.floats(0.01, 1),
    st.floats(0, 1),
)
def test_drawn_token_is_among_those_kept(seed, vocab, temperature, top_k, top_p, min_p):
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    x_BV = logits(4, seed=seed, vocab=vocab)
    drawn = draw(x_BV.clone(), [params] * 4, [0, 1, 2, 3]).tolist()
    for index, token in enumerate(drawn):
        scaled = [value / temperature for value in x_BV[index].tolist()]
        kept = kept_tokens(scaled, params)
        smallest = min(scaled[t] for t in kept)
        assert scaled[token] >= smallest - 1e-3


def test_frequencies_follow_the_filtered_distribution():
    params = SamplingParams(temperature=0.8, top_p=0.9)
    x_V = logits(1, seed=8)
    many = 20_000
    drawn = draw(x_V.repeat(many, 1), [params] * many, list(range(many)))
    kept = kept_tokens([value / 0.8 for value in x_V[0].tolist()], params)
    counts = torch.bincount(drawn, minlength=VOCAB).tolist()
    assert sum(counts[t] for t in kept) == many
    tokens = [t for t in kept if kept[t] * many >= 5]
    chi_squared = sum((counts[t] - many * kept[t]) ** 2 / (many * kept[t]) for t in tokens)
    degrees = len(tokens) - 1
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees)


def test_every_tie_at_the_threshold_is_kept():
    x_V = torch.zeros(1, 64)
    drawn = draw(
        x_V.repeat(2000, 1), [SamplingParams(temperature=1.0, top_k=3)] * 2000, list(range(2000))
    )
    assert len(drawn.unique()) == 64


def test_extreme_logits_give_tokens_of_weight():
    x_BV = torch.full((3, 130), -torch.inf)
    x_BV[0, 129] = -1e30
    x_BV[1, 0] = 1e30
    x_BV[2, 5] = 0.0
    params = [SamplingParams(temperature=1.0), SamplingParams(top_p=0.1), SamplingParams(top_k=4)]
    assert draw(x_BV, params, [0, 1, 2]).tolist() == [129, 0, 5]


def reference_penalties(x: list[float], p: SamplingParams, prompt, output) -> list[float]:
    x = list(x)
    for token, bias in p.logit_bias:
        x[token] += bias
    if len(output) < p.min_tokens:
        for token in p.stop_token_ids | (frozenset() if p.ignore_eos else EOS):
            x[token] = -math.inf
    for token in {*prompt, *output}:
        x[token] = (
            x[token] / p.repetition_penalty if x[token] > 0 else (x[token] * p.repetition_penalty)
        )
    for token in set(output):
        x[token] -= p.frequency_penalty * output.count(token) + p.presence_penalty
    return x


PENALTY_SETS = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"logit_bias": ((3, 4.0), (9, -100.0))},
    {"min_tokens": 50, "stop_token_ids": frozenset({11, 12})},
    {"min_tokens": 50, "ignore_eos": True},
    {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": ((1, 2.0),),
        "min_tokens": 50,
    },
]


@pytest.mark.parametrize("changes", PENALTY_SETS, ids=str)
def test_penalties_equal_the_naive_reference(changes):
    rng = random.Random(1)
    params = SamplingParams(temperature=0.0, **changes)
    x_BV = logits(8, seed=5)
    rows, expected = [], []
    for index in range(8):
        prompt = [rng.randrange(VOCAB) for _ in range(20)]
        output = [rng.randrange(VOCAB) for _ in range(15)]
        rows.append(row(params, prompt=prompt, output=output))
        adjusted = reference_penalties(x_BV[index].tolist(), params, prompt, output)
        expected.append(int(np.argmax(adjusted)))
    assert [token.token_id for token in sample(x_BV, rows)] == expected


def test_penalties_count_drawn_tokens():
    one = row(SamplingParams(temperature=0.0, frequency_penalty=2.0, max_tokens=9), prompt=[1])
    x_V = torch.zeros(1, VOCAB)
    x_V[0, 4], x_V[0, 5] = 3.0, 2.0
    drawn = [sample(x_V.clone(), [one])[0].token_id for _ in range(4)]
    assert drawn == [4, 5, 4, 0]


def test_history_grows_beyond_its_first_arrays():
    history = TokenHistory(range(10), [])
    for token in range(500):
        history.add(token % 250)
    assert len(history.token_ids) == 250
    assert history.output_counts.tolist() == [2.0] * 250


def test_no_end_token_is_drawn_before_min_tokens():
    """As in transformers' min_new_tokens and in vLLM: the end token does not count."""
    params = SamplingParams(temperature=0.0, min_tokens=3)
    x_V = torch.zeros(1, VOCAB)
    x_V[0, 7] = 9.0
    drawn = [
        sample(x_V.clone(), [row(params, prompt=[1], output=[2] * n)])[0].token_id for n in range(5)
    ]
    assert drawn == [0, 0, 0, 7, 7]


def test_logprobs_are_raw_and_top_ones_sorted():
    params = SamplingParams(
        temperature=0.5, top_k=1, repetition_penalty=1.4, num_top_logprobs=4, logit_bias=((2, 50),)
    )
    x_BV = logits(2, seed=9)
    expected = x_BV.log_softmax(-1)
    plain = row(SamplingParams(temperature=0.0))
    drawn = sample(x_BV.clone(), [plain, row(params, prompt=[1, 2])])
    assert drawn[0].logprobs is None
    assert drawn[1].token_id == 2
    logprobs = drawn[1].logprobs
    assert logprobs is not None
    assert logprobs.logprob == pytest.approx(expected[1, 2].item(), abs=1e-6)
    values, token_ids = expected[1].topk(4)
    assert [token for token, _ in logprobs.top] == token_ids.tolist()
    assert [value for _, value in logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_zero_top_logprobs_give_the_drawn_one_only():
    drawn = sample(logits(1), [row(SamplingParams(temperature=0.0, num_top_logprobs=0))])
    assert drawn[0].logprobs is not None
    assert drawn[0].logprobs.top == ()


def random_params(rng: random.Random) -> SamplingParams:
    return SamplingParams(
        temperature=rng.choice([0.0, 0.6, 1.0, 1.7]),
        top_p=rng.choice([1.0, 0.9, 0.4]),
        top_k=rng.choice([0, 0, 3, 50]),
        min_p=rng.choice([0.0, 0.0, 0.05]),
        presence_penalty=rng.choice([0.0, 0.7]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        logit_bias=rng.choice([(), ((4, 3.0),)]),
        min_tokens=rng.choice([0, 30]),
        seed=rng.randrange(2**64),
        num_top_logprobs=rng.choice([None, None, 0, 5]),
    )


@pytest.mark.parametrize("vocab", [VOCAB, 4096])
def test_token_does_not_depend_on_the_batch(vocab):
    rng = random.Random(2)
    for trial in range(20):
        x_BV = logits(16, seed=trial, vocab=vocab)
        params = [random_params(rng) for _ in range(16)]
        tokens = [[rng.randrange(VOCAB) for _ in range(12)] for _ in range(16)]

        def rows(indices, params=params, tokens=tokens):
            return [row(params[i], prompt=tokens[i][:6], output=tokens[i][6:]) for i in indices]

        together = sample(x_BV.clone(), rows(range(16)))
        alone = [sample(x_BV[i : i + 1].clone(), rows([i]))[0] for i in range(16)]
        assert together == alone
