"""How heads, features, tokens and layers are spread over ranks they need not divide by."""

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.config import ModelConfig, RopeConfig
from engine.kernels.interface import HeadShape
from engine.parallel.fit import check_layout_fits
from engine.parallel.heads import head_split
from engine.parallel.layout import ParallelLayout
from engine.parallel.spread import spread
from engine.parallel.stages import layer_cost, stage_layers

DEMO = HeadShape(9, 3, 64)


def config_of(num_layers: int, *, vocab_size: int = 1024) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_layers=num_layers,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_context_tokens=512,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        windows=(None,) * num_layers,
    )


@given(st.integers(1, 5000), st.data())
def test_spread_covers_all_once_and_evenly(size: int, data: st.DataObject) -> None:
    num_parts = data.draw(st.integers(1, min(size, 40)))
    alignment = data.draw(st.sampled_from((1, 16, 32)))
    parts = spread(size, num_parts, alignment=alignment, what="size")
    assert [index for part in parts for index in part] == list(range(size))
    assert min(map(len, parts)) > 0
    assert max(map(len, parts)) - min(map(len, parts)) <= 2 * alignment
    if size >= alignment * num_parts:
        assert all(part.start % alignment == 0 for part in parts)


@given(st.integers(1, 16), st.integers(1, 8), st.data())
def test_every_head_stands_where_its_kv_head_is(
    num_kv_heads: int, group: int, data: st.DataObject
) -> None:
    heads = HeadShape(num_kv_heads * group, num_kv_heads, 8)
    size = data.draw(st.integers(1, heads.num_heads))
    splits = [head_split(heads, size, rank) for rank in range(size)]
    assert [head for split in splits for head in split.heads] == list(range(heads.num_heads))
    for split in splits:
        assert {head // group for head in split.heads} == set(split.kv_heads)
        assert len(split.heads) % len(split.kv_heads) == 0
        copies = [other for other in splits if set(other.kv_heads) & set(split.kv_heads)]
        assert split.num_copies == len(copies)
        assert copies[split.copy] == split
    unit = group if size <= num_kv_heads else 1
    counts = [len(split.heads) for split in splits]
    if size <= num_kv_heads or size % num_kv_heads == 0:
        assert max(counts) - min(counts) <= unit


def test_heads_of_the_demo_model() -> None:
    def counts(size: int) -> list[tuple[int, int]]:
        splits = [head_split(DEMO, size, rank) for rank in range(size)]
        return [(len(split.heads), len(split.kv_heads)) for split in splits]

    assert counts(2) == [(6, 2), (3, 1)]
    assert counts(3) == [(3, 1)] * 3
    assert counts(4) == [(2, 1), (1, 1), (3, 1), (3, 1)]
    assert counts(9) == [(1, 1)] * 9
    with pytest.raises(ValueError, match=r"tp=10 needs a query head for each rank.* has 9"):
        head_split(DEMO, 10, 0)


@given(st.integers(1, 12), st.integers(1, 200_000), st.data())
def test_stages_are_as_even_as_can_be(
    num_layers: int, vocab_size: int, data: st.DataObject
) -> None:
    config = config_of(num_layers, vocab_size=vocab_size)
    size = data.draw(st.integers(1, num_layers))
    stages = [layers for stage in range(size) for layers in stage_layers(config, size, stage)]
    assert len(stages) == size
    assert [index for stage in stages for index in stage] == list(range(num_layers))

    def dearest(starts: list[int]) -> int:
        costs = [
            sum(layer_cost(config, index) for index in range(start, stop))
            for start, stop in pairwise([*starts, num_layers])
        ]
        costs[0] += config.hidden_size
        costs[-1] += config.vocab_size * config.hidden_size
        return max(costs)

    cuts = ([0, *cut] for cut in combinations(range(1, num_layers), size - 1))
    assert dearest([stage.start for stage in stages]) == min(map(dearest, cuts))


def test_stages_differ_by_one_layer_where_the_head_is_light() -> None:
    config = config_of(10, vocab_size=1)
    assert sorted(len(stage_layers(config, 4, stage)[0]) for stage in range(4)) == [2, 2, 3, 3]


def test_a_heavy_head_has_fewer_layers_beside_it() -> None:
    config = config_of(30, vocab_size=8 * layer_cost(config_of(1), 0) // 64)
    assert [len(stage_layers(config, 2, stage)[0]) for stage in range(2)] == [19, 11]
    stages = [stage_layers(config, 2, stage, is_for_prompts=True) for stage in range(2)]
    assert stages == [(range(15),), (range(15, 30),)], "one token of a prompt needs the head"


@given(st.integers(1, 40), st.data())
def test_interleaved_stages_hold_every_layer_once_in_turns(
    num_layers: int, data: st.DataObject
) -> None:
    config = config_of(num_layers)
    size = data.draw(st.integers(1, num_layers))
    num_ranges = data.draw(st.integers(1, num_layers // size))
    stages = [stage_layers(config, size, stage, num_ranges) for stage in range(size)]
    assert {len(ranges) for ranges in stages} == {num_ranges}
    in_turns = [stages[stage][index] for index in range(num_ranges) for stage in range(size)]
    assert [layer for layers in in_turns for layer in layers] == list(range(num_layers))
    (alone,) = stage_layers(config, size * num_ranges, 0)
    assert in_turns[0] == alone, "cut as for that many stages"


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pp=2,interleave=2 needs a layer .* range .* has 3"):
        stage_layers(config_of(3), 2, 0, 2)
    with pytest.raises(ValueError, match=r"pp=4 needs a layer for each stage.* has 3"):
        stage_layers(config_of(3), 4, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=5", "tp=5 needs tp at most 4: .* 4 query heads.*; use tp=4 or pp=5"),
        ("tp=8", "8 does not fit .*; use tp=4 or tp=4,pp=2 or tp=2,pp=4"),
        ("pp=7", "pp=7 needs pp at most 6: .* 6 layers; use pp=6"),
        ("tp=6,pp=8", "tp=6 .* pp=8 .*; use tp=4,pp=6"),
        ("pp=2,interleave=4", "interleave=4 needs interleave at most 3: .*; use pp=2,interleave=3"),
        ("tp=8,pp=2,interleave=2", "use tp=4,pp=2,interleave=2 or tp=4,pp=4"),
        ("tp=6,sp=2", "use tp=4,sp=2 or tp=3,pp=2,sp=2"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused_with_those_that_do(text: str, words: str) -> None:
    config = config_of(6)
    with pytest.raises(ValueError, match=words) as refused:
        check_layout_fits(config, ParallelLayout.parse(text))
    named = str(refused.value).rpartition("use ")[2].split(" or ")
    for near in named:
        check_layout_fits(config, ParallelLayout.parse(near))


@pytest.mark.parametrize(
    "text", ["tp=4", "pp=6", "pp=3,interleave=2", "tp=4,pp=6,dp=2", "tp=3,pp=5"]
)
def test_layouts_that_fit(text: str) -> None:
    check_layout_fits(config_of(6), ParallelLayout.parse(text))
