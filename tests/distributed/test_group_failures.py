"""A rank that dies, stops or cannot load: rank 0 names it, every request is told, nobody hangs."""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import IsthmusError, RankGroupError
from engine.parallel import CollectivesConfig, ParallelLayout, RankGroup
from engine.request import Request
from engine.runtime.build import ModelEngine
from engine.runtime.commands import SequenceMode
from engine.runtime.engine_thread import EngineThread
from tests.checkpoints import tiny_checkpoint
from tests.distributed.group_engine import Answers, follow, lead, member, request_of
from tests.distributed.ranks import RankProcesses

TIMEOUT_S = 1.5
CONFIG = CollectivesConfig(collective_timeout_s=TIMEOUT_S)
MANY_TOKENS = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("llama"), num_attention_heads=4, num_hidden_layers=4
    )


class Told(Answers):
    """Writes a file with the first token, so that the test knows that steps are running."""

    def __init__(self, mark: Path) -> None:
        super().__init__(1)
        self._mark = mark

    def put(self, events: Any) -> None:
        super().put(events)
        if self.tokens:
            self.say_running()

    def say_running(self) -> None:
        self._mark.touch()


async def serve_until_dead(
    engine: ModelEngine, mark: Path, request: Request | None
) -> dict[str, Any]:
    answers = Told(mark)
    async with EngineThread(engine) as thread:
        if request is None:
            answers.say_running()
        else:
            thread.submit(request, SequenceMode.LOCAL, answers)
        await thread.dead.wait()
        death = thread.death
        assert isinstance(death, RankGroupError), death
    return {
        "rank": death.rank,
        "text": str(death),
        "told": [str(error) for error in answers.errors],
    }


def rank_of_group(
    group: RankGroup, path: str, settings: dict[str, Any], mark: str, is_busy: bool
) -> dict[str, Any]:
    """Rank 0 answers what its engine died of, the others what ended them."""
    membership = member(group, CONFIG)
    try:
        if membership.leader is not None:
            follow(membership, Path(path), settings)
            return {"text": "ended in order"}
        engine = lead(membership, Path(path), settings)
        request = request_of(0, [5, 6, 7], MANY_TOKENS) if is_busy else None
        return asyncio.run(serve_until_dead(engine, Path(mark), request))
    except IsthmusError as error:
        return {"text": f"{type(error).__name__}: {error}"}


def until_exists(path: Path) -> None:
    end_s = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < end_s, f"{path.name} was not written"
        time.sleep(0.005)


@pytest.mark.parametrize("layout", ["tp=3", "pp=3", "tp=2,pp=2"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["mid-step", "idle"])
def test_a_killed_rank_is_named(
    layout: str, is_busy: bool, checkpoint: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    settings = {"parallel": ParallelLayout.parse(layout)}
    arguments = (str(checkpoint), settings, str(mark), is_busy)
    with RankProcesses(layout, rank_of_group, *arguments, config=CONFIG) as ranks:
        until_exists(mark)
        ranks.kill(2)
        leader, survivor = ranks.results([0, 1], timeout_s=20)
    assert leader["rank"] == 2, leader
    assert "rank 2" in leader["text"]
    assert leader["told"] == ([leader["text"]] if is_busy else [])
    assert "rank" in survivor["text"], survivor


@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
@pytest.mark.parametrize("is_busy", [True, False], ids=["mid-step", "idle"])
def test_a_stopped_rank_is_named_once_it_was_silent_for_its_time(
    layout: str, is_busy: bool, checkpoint: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    settings = {"parallel": ParallelLayout.parse(layout)}
    arguments = (str(checkpoint), settings, str(mark), is_busy)
    with RankProcesses(layout, rank_of_group, *arguments, config=CONFIG) as ranks:
        until_exists(mark)
        stopped_s = time.monotonic()
        ranks.kill(1, signal.SIGSTOP)
        (leader,) = ranks.results([0], timeout_s=20)
        took_s = time.monotonic() - stopped_s
    assert leader["rank"] == 1, leader
    assert "rank 1" in leader["text"]
    assert leader["told"] == ([leader["text"]] if is_busy else [])
    assert took_s > TIMEOUT_S / 2, "it may only be slow"


def test_followers_end_when_rank_0_is_killed(checkpoint: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    settings = {"parallel": ParallelLayout(tp=3)}
    arguments = (str(checkpoint), settings, str(mark), False)
    with RankProcesses("tp=3", rank_of_group, *arguments, config=CONFIG) as ranks:
        until_exists(mark)
        ranks.kill(0)
        for follower in ranks.results([1, 2], timeout_s=20):
            assert "rank 0" in follower["text"], follower


def rank_that_may_not_load(
    group: RankGroup, paths: list[str], settings: list[dict[str, Any]]
) -> str:
    path, own = Path(paths[group.rank]), settings[group.rank]
    membership = member(group, CONFIG)
    try:
        if membership.leader is not None:
            follow(membership, path, own)
            return "ended in order"
        engine = lead(membership, path, own)
        engine.close()
    except (IsthmusError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "started"


def start(paths: list[Path], *settings: dict[str, Any]) -> list[str]:
    layout = ParallelLayout(tp=len(paths))
    own = [{"parallel": layout, **each} for each in settings]
    with RankProcesses(
        layout, rank_that_may_not_load, [str(path) for path in paths], own, config=CONFIG
    ) as ranks:
        found: list[str] = ranks.results(timeout_s=30)
        return found


def test_a_rank_whose_checkpoint_lacks_a_tensor_is_quoted_by_all(
    checkpoint: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        if file.suffix != ".safetensors":
            (damaged / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors")
    leader, other, broken = start([checkpoint, checkpoint, damaged], {}, {}, {})
    assert broken.startswith("CheckpointError")
    assert "lacks model.norm.weight" in broken
    assert leader.startswith("RankGroupError: rank 2 failed: CheckpointError")
    assert "lacks model.norm.weight" in leader
    assert "rank 2 failed" in other


def test_ranks_that_were_started_differently_are_told_both_sides(checkpoint: Path) -> None:
    leader, follower = start([checkpoint] * 2, {}, {"block_size_tokens": 8, "dtype": "bfloat16"})
    for text in (leader, follower):
        assert text.startswith("LayoutMismatchError"), text
        assert "dtype is float32 on rank 0 and bfloat16 on rank 1" in text
        assert "block_size_tokens is 16 on rank 0 and 8 on rank 1" in text


def test_another_checkpoint_is_noticed(checkpoint: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path, num_attention_heads=4, num_hidden_layers=4, seed=1)
    leader, _ = start([checkpoint, other], {}, {})
    assert "model_digest is" in leader
