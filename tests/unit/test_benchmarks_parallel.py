"""The benchmark of parallel layouts: its tables, its checkpoints and what it counts."""

from pathlib import Path

import pytest
from safetensors import safe_open

from benchmarks import parallel
from benchmarks.ranks.checkpoints import NUM_EXPERTS, write_experts
from benchmarks.ranks.loads import LoadRow, imbalances
from engine.checkpoint.read import read_config


def row(layout: str, median_ms: float, **changes: object) -> LoadRow:
    fields = {
        "layout": layout,
        "threads_per_rank": 1,
        "load": "decode 8",
        "has_shared_memory": True,
        "is_overlapped": None,
        "kv_exchange": None,
        "num_micro_batches": None,
        "median_ms": median_ms,
        "tokens_per_s": 8e3 / median_ms,
        "collective_share": 0.1,
        "bubble_share": 0.25,
        "expert_imbalance": 1.0,
        "rank_imbalance": 1.0,
    }
    return LoadRow(**{**fields, **changes})  # type: ignore[arg-type]


def test_layouts_are_held_against_one_rank_and_crowded_ones_are_marked() -> None:
    table = parallel.layouts_table([row("1", 30.0), row("pp=2", 20.0), row("tp=3", 60.0)], 2)
    _, alone, pipeline, crowded, note = table.splitlines()
    assert alone.split()[-5:] == ["30.0", "267", "1.00", "10%", "25%"]
    assert pipeline.split()[-3:] == ["1.50", "10%", "25%"]
    assert crowded.startswith("decode 8, tp=3 *")
    assert note == "* more ranks than cores (2): they take turns"


def test_two_ways_to_exchange_stand_in_rows_of_their_own() -> None:
    tcp = {"has_shared_memory": False}
    rows = [row("1", 30.0), row("sp=2", 20.0), row("sp=2", 40.0, **tcp)]
    rows.append(row("sp=2", 30.0, kv_exchange="ring", **tcp))
    lines = parallel.layouts_table(rows, 2).splitlines()
    assert [line.startswith("decode 8, sp=2 over TCP") for line in lines[1:]] == [0, 0, 1, 1]
    assert [line.startswith("decode 8, sp=2 over TCP, ring ") for line in lines[1:]] == [0, 0, 0, 1]
    waiting = row("tp=2", 40.0, has_shared_memory=False, is_overlapped=False)
    assert "tp=2 over TCP, waiting" in parallel.layouts_table([row("1", 30.0), waiting], 2)


def test_imbalance_is_that_of_the_tokens_counted_in_between() -> None:
    """Two ranks with two experts each; layers add up."""
    before = [{0: [5, 5, 0, 0], 1: [0, 0, 0, 0]}, {0: [0, 0, 5, 5], 1: [0, 0, 0, 0]}]
    after = [{0: [8, 6, 0, 0], 1: [3, 1, 0, 0]}, {0: [0, 0, 6, 6], 1: [0, 0, 1, 1]}]
    found = imbalances(before, after)
    assert found == {"expert_imbalance": 6 * 4 / 12, "rank_imbalance": 8 * 2 / 12}
    assert imbalances([], []) == {"expert_imbalance": 1.0, "rank_imbalance": 1.0}
    shared = [{0: [3, 1]}, {0: [0, 0]}]  # ranks that share experts: one of them counts
    assert imbalances([{0: [0, 0]}] * 2, shared)["rank_imbalance"] == 1.0


@pytest.mark.parametrize("skew", [0.0, 4.0])
def test_a_skewed_router_gives_experts_a_head_start_in_order(tmp_path: Path, skew: float) -> None:
    path = write_experts(tmp_path / "experts", skew=skew)
    experts = read_config(path).form.experts
    assert experts is not None
    assert experts.num_experts == NUM_EXPERTS
    with safe_open(path / "model.safetensors", framework="pt") as weights:
        gate = weights.get_tensor("model.layers.0.block_sparse_moe.gate.weight")[:, 0]
        embedding = weights.get_tensor("model.embed_tokens.weight")[:, 0]
        written = weights.get_tensor("model.layers.0.self_attn.o_proj.weight")[0]
    assert bool((embedding == embedding[0]).all())
    assert not written.any(), "nothing but the embedding writes the channel"
    assert [round(float(start * embedding[0]), 1) for start in gate[:2]] == [skew, skew / 2]
