import json
from pathlib import Path

import pytest

from benchmarks.load.scenario import MixedLoad, OpenLoad, TraceLoad, standard_loads
from benchmarks.load.schedule import Prompt, PromptSource, TokenRange
from benchmarks.load.trace import prompts_of_trace

TOKENS = TokenRange(start=100, stop=200)


def source(seed: int = 1, name: str = "x") -> PromptSource:
    return PromptSource(TOKENS, seed=seed, name=name)


def test_the_same_seed_and_name_draw_the_same_requests() -> None:
    assert source().poisson(5, 8, 4, per_s=2.0) == source().poisson(5, 8, 4, per_s=2.0)


@pytest.mark.parametrize("other", [source(seed=2), source(name="y")], ids=["seed", "name"])
def test_another_seed_or_name_draws_other_requests(other: PromptSource) -> None:
    assert other.prompts(3, 8, 4) != source().prompts(3, 8, 4)


def test_the_draw_does_not_change_between_releases() -> None:
    assert source().prompt(4, 1).token_ids == (163, 103, 189, 103)


def test_prompts_share_no_prefix_block() -> None:
    heads = {prompt.token_ids[:16] for prompt in source().prompts(200, 32, 1)}
    assert len(heads) == 200


def test_token_ids_stay_in_their_range() -> None:
    token_ids = source().prompt(2000, 1).token_ids
    assert min(token_ids) == 100
    assert max(token_ids) == 199


def test_poisson_arrivals_have_their_rate_and_spread() -> None:
    at_s = [prompt.at_s for prompt in source().poisson(4000, 1, 1, per_s=2.0)]
    gaps_s = [after - before for before, after in zip([0.0, *at_s], at_s, strict=False)]
    mean_s = sum(gaps_s) / len(gaps_s)
    variance = sum((gap_s - mean_s) ** 2 for gap_s in gaps_s) / len(gaps_s)
    assert at_s == sorted(at_s)
    assert mean_s == pytest.approx(0.5, rel=0.05)
    assert variance**0.5 == pytest.approx(mean_s, rel=0.1)


@pytest.mark.parametrize("text", [(5, 5), (-1, 3)])
def test_an_empty_token_range_is_refused(text: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="START < STOP"):
        TokenRange(start=text[0], stop=text[1])


def test_the_standard_loads_are_those_we_make_claims_about() -> None:
    full, quick = standard_loads(is_quick=False), standard_loads(is_quick=True)
    assert list(full) == list(quick) == ["single", "closed", "closed16", "open", "mixed"]
    assert [str(load) for load in full.values()] == [str(load) for load in quick.values()]
    assert isinstance(full["open"], OpenLoad)
    assert isinstance(full["mixed"], MixedLoad)
    assert full["mixed"].num_long_prompts == 8


def trace_prompts(path: Path, **limits: int) -> list[Prompt]:
    lines = [
        {"timestamp": 5000, "input_length": 700, "output_length": 50, "hash_ids": [3, 4]},
        {"timestamp": 9000, "input_length": 1500, "output_length": 9, "hash_ids": [3, 5, 6]},
    ]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    load = TraceLoad(
        name="trace",
        file=str(path),
        rate=2.0,
        num_requests=10,
        max_prompt_tokens=limits.get("prompt", 9999),
        max_output_tokens=limits.get("output", 9999),
    )
    return prompts_of_trace(load, source())


def test_a_trace_keeps_its_lengths_times_and_shared_prefixes(tmp_path: Path) -> None:
    first, second = trace_prompts(tmp_path / "trace.jsonl")
    assert (len(first.token_ids), len(second.token_ids)) == (700, 1500)
    assert (first.at_s, second.at_s) == (0.0, 2.0)
    assert first.token_ids[:512] == second.token_ids[:512]
    assert first.token_ids[512:520] != second.token_ids[512:520]


def test_a_trace_is_cut_to_the_limits(tmp_path: Path) -> None:
    prompts = trace_prompts(tmp_path / "trace.jsonl", prompt=600, output=20)
    assert [len(prompt.token_ids) for prompt in prompts] == [600, 600]
    assert [prompt.max_tokens for prompt in prompts] == [20, 9]
