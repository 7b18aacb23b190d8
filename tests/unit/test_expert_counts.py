"""Tokens by expert, kept in a file: what comes back, and what is refused."""

from pathlib import Path

import pytest

from engine.checkpoint.digest import model_digest
from engine.checkpoint.form import ExpertsForm
from engine.config import EngineConfig
from engine.parallel.axes import AxisGroup
from engine.parallel.expert_placement import ExpertPlacement
from engine.runtime.expert_counts import (
    read_counts,
    share_placements,
    wanted_placements,
    write_counts,
)

FORM = ExpertsForm(num_experts=4, num_chosen=2, intermediate_size=8, layers=frozenset({1, 3}))
RANKS = [{1: [7, 0, 1, 0], 3: [0] * 4}, {1: [0, 2, 1, 0], 3: [5, 5, 5, 5]}, {}]
SUM = {1: [7, 2, 2, 0], 3: [5, 5, 5, 5]}


def test_the_ranks_counts_are_added_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    write_counts(path, RANKS, digest="ab")
    assert read_counts(path, digest="ab", experts=FORM) == SUM
    write_counts(path, [{1: [0] * 4, 3: [0] * 4}], digest="ab")
    assert read_counts(path, digest="ab", experts=FORM) == SUM, "nothing was counted"
    assert list(tmp_path.iterdir()) == [path]


def test_no_file_yet_is_no_counts(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    config = EngineConfig(expert_counts=path, num_spare_experts=1)
    assert wanted_placements(config, FORM, tmp_path, num_ranks=2) == {}


@pytest.mark.parametrize(
    ("content", "digest", "words"),
    [
        (b"{", "ab", "cannot be read"),
        (b'{"model_digest": "ab", "tokens": {"1": ["x"]}}', "ab", "cannot be read"),
        (b'{"model_digest": "ab", "tokens": {"1": [1, 2, 3, 4]}}', "ab", "of 1 layers"),
        (b'{"model_digest": "ab", "tokens": {"1": [1], "3": [1]}}', "ab", "2 layers of 4"),
        (b'{"model_digest": "ab", "tokens": {"1": [1,1,1,-1], "3": [1,1,1,1]}}', "ab", "2 layers"),
        (b'{"model_digest": "ab", "tokens": {"1": [1,1,1,1], "3": [1,1,1,1]}}', "cd",
         "counted for model ab, not for cd"),
    ],
)  # fmt: skip
def test_other_counts_are_refused(content: bytes, digest: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_counts(path, digest=digest, experts=FORM)


def test_a_file_that_cannot_be_written_does_not_end_the_worker(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_counts(tmp_path / "none" / "counts.json", RANKS, digest="ab")
    assert "are not kept" in caplog.text


def test_counts_become_a_placement_that_is_told_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    model = tmp_path / "model.gguf"
    model.write_bytes(b"a model")
    write_counts(path, RANKS, digest=model_digest(model))
    config = EngineConfig(expert_counts=path, num_spare_experts=1)
    wanted = wanted_placements(config, FORM, model, num_ranks=2)
    assert wanted[1] == ExpertPlacement(((0, 1, 2), (0, 1, 3)))
    assert share_placements(wanted, AxisGroup()) == wanted


def test_spare_places_without_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="needs expert_counts"):
        EngineConfig(num_spare_experts=1)
