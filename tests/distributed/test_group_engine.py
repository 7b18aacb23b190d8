"""A worker of several ranks draws the tokens that one rank draws, through its real thread."""

import asyncio
import random
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.checkpoint.digest import model_digest
from engine.checkpoint.read import read_config
from engine.parallel import ParallelLayout, RankGroup
from engine.runtime.commands import SequenceMode
from engine.runtime.engine_thread import EngineThread
from engine.runtime.expert_counts import ExpertCounts, read_counts
from engine.runtime.group_runner import GroupRunner
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.distributed.group_engine import (
    ENGINE,
    Answers,
    answer_all,
    follow,
    lead,
    member,
    request_of,
)
from tests.distributed.ranks import run_ranks

NUM_TOKENS = 10
LENGTHS = (1, 5, 16, 17, 33, 64, 65, 150)


def prompts() -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("llama"),
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=72,
        head_dim=8,
        num_hidden_layers=4,
    )


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, list[int]]:
    return asyncio.run(answer_all(lead(None, checkpoint, {}), prompts(), NUM_TOKENS)).tokens


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("mixture"),
        "qwen2_moe",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=40,
        shared_expert_intermediate_size=56,
        num_hidden_layers=4,
    )


def answers_of_group(group: RankGroup, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    membership = member(group)
    if membership.leader is not None:
        follow(membership, Path(path), settings)
        return {}
    engine = lead(membership, Path(path), settings)
    answers = asyncio.run(answer_all(engine, prompts(), NUM_TOKENS))
    assert isinstance(engine.runner, GroupRunner)
    return {
        "tokens": answers.tokens,
        "num_blocks": engine.limits.num_blocks,
        "experts": [list(load.experts) for load in engine.runner.model.expert_loads.values()],
        "times": [[each.num_steps, each.busy_s, each.step_s] for each in engine.runner.times],
    }


@pytest.mark.parametrize(
    "layout",
    ["tp=2", "tp=3", "pp=2", "pp=3", "tp=2,pp=2", "pp=2,interleave=2", "tp=2,pp=2,interleave=2",
     "tp=2,sp=2", "sp=2,pp=2"],
)  # fmt: skip
def test_ranks_draw_the_tokens_of_one(
    layout: str, checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    settings = {"parallel": ParallelLayout.parse(layout)}
    leader, *_ = run_ranks(layout, answers_of_group, str(checkpoint), settings)
    assert leader["tokens"] == expected


def test_ranks_exchange_rows_with_their_scales(checkpoint: Path) -> None:
    expected = asyncio.run(
        answer_all(lead(None, checkpoint, {"kv_dtype": "int8"}), prompts(), NUM_TOKENS)
    ).tokens
    settings = {"parallel": ParallelLayout.parse("sp=2"), "kv_dtype": "int8"}
    leader, *_ = run_ranks("sp=2", answers_of_group, str(checkpoint), settings)
    assert leader["tokens"] == expected


@pytest.mark.parametrize(
    "layout",
    ["dp=2", "ep=2", "ep=4", "dp=3,ep=3", "tp=2,dp=2,ep=2", "tp=2,dp=2,ep=4", "pp=2,dp=2,ep=2",
     "pp=2,interleave=2,dp=2,ep=2", "sp=2,dp=2,ep=4"],
)  # fmt: skip
def test_data_shards_draw_the_tokens_of_one_rank(layout: str, mixture: Path) -> None:
    """Eight prompts are shared out; shards have none, some, or the last sequences to end."""
    expected = asyncio.run(answer_all(lead(None, mixture, {}), prompts(), NUM_TOKENS)).tokens
    settings = {"parallel": ParallelLayout.parse(layout)}
    leader, *_ = run_ranks(layout, answers_of_group, str(mixture), settings)
    assert leader["tokens"] == expected


@pytest.mark.parametrize("layout", ["tp=2,ep=2", "ep=2"])
def test_replicas_of_hot_experts_change_no_token(
    layout: str, mixture: Path, tmp_path: Path
) -> None:
    """What one run counts places the experts of the next."""
    expected = asyncio.run(answer_all(lead(None, mixture, {}), prompts(), NUM_TOKENS)).tokens
    path = tmp_path / "counts.json"
    settings = {
        "parallel": ParallelLayout.parse(layout),
        "expert_counts": path,
        "num_spare_experts": 1,
    }
    tokens = {layer: [900, 1, 1, 300, 1, 1] for layer in range(4)}
    counted = ExpertCounts(model_digest(mixture), tokens)
    path.write_bytes(msgspec.json.encode(counted))
    leader, *_ = run_ranks(layout, answers_of_group, str(mixture), settings)
    assert leader["tokens"] == expected
    assert leader["experts"] == [[0, 1, 3, 4]] * 4
    experts = read_config(mixture).form.experts
    assert experts is not None
    kept = read_counts(path, digest=model_digest(mixture), experts=experts)
    assert kept != tokens
    assert all(sum(counts) > 0 for counts in kept.values())


def start_with_short_context(group: RankGroup, path: str, settings: dict[str, Any]) -> int:
    membership = member(group)
    if membership.leader is not None:
        follow(membership, Path(path), settings)
        return 0
    engine = lead(membership, Path(path), settings)
    answers = asyncio.run(answer_all(engine, prompts()[:3], NUM_TOKENS))
    return sum(len(tokens) for tokens in answers.tokens.values())


def test_a_context_shorter_than_a_step_is_warmed_up_within_its_bound(checkpoint: Path) -> None:
    """The other ranks refuse plans past it."""
    settings = {"parallel": ParallelLayout.parse("tp=2"), "max_context_tokens": 32}
    assert ENGINE["max_num_batched_tokens"] == 64
    found = run_ranks("tp=2", start_with_short_context, str(checkpoint), settings)
    assert found[0] == 3 * NUM_TOKENS


def answers_one_by_one(group: RankGroup, path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A request at a time: all other shards are empty in every step."""
    membership = member(group)
    if membership.leader is not None:
        follow(membership, Path(path), settings)
        return {}
    engine = lead(membership, Path(path), settings)
    found: dict[str, list[int]] = {}

    async def answer() -> None:
        async with EngineThread(engine) as thread:
            for index, prompt in enumerate(prompts()):
                answers = Answers(1)
                request = request_of(index, prompt, NUM_TOKENS)
                thread.submit(request, SequenceMode.LOCAL, answers)
                await answers.done.wait()
                found.update(answers.tokens)

    asyncio.run(answer())
    engine.scheduler.check_conservation()
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    return {"tokens": found}


def test_a_shard_alone_at_work_has_the_other_ranks_experts(mixture: Path) -> None:
    expected = asyncio.run(answer_all(lead(None, mixture, {}), prompts(), NUM_TOKENS)).tokens
    settings = {"parallel": ParallelLayout.parse("ep=2")}
    leader, *_ = run_ranks("ep=2", answers_one_by_one, str(mixture), settings)
    assert leader["tokens"] == expected
