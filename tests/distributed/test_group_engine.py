"""A worker of several ranks draws the tokens that one rank draws, through its real thread."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from engine.parallel import ParallelLayout, RankGroup
from engine.runtime.group_runner import GroupRunner
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.distributed.group_engine import answer_all, follow, lead, member
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
        "times": [[each.num_steps, each.busy_s, each.step_s] for each in engine.runner.times],
    }


@pytest.mark.parametrize("layout", ["tp=2", "tp=3", "pp=2", "tp=2,pp=2"])
def test_ranks_draw_the_tokens_of_one(
    layout: str, checkpoint: Path, expected: dict[str, list[int]]
) -> None:
    settings = {"parallel": ParallelLayout.parse(layout)}
    leader, *_ = run_ranks(layout, answers_of_group, str(checkpoint), settings)
    assert leader["tokens"] == expected
