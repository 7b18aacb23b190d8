"""What the KV transfer benchmark says about its figures, and the places that it moves blocks to."""

import pytest

from benchmarks.moving.case import (
    POOL_BYTES,
    QUICK_BYTES,
    Case,
    cases,
    layout_of,
    scattered,
)
from benchmarks.moving.comparison import overlap_table, rate_table, rates_of, verdicts
from benchmarks.moving.figure import Figure, Overlap


def figure(way: str, gb_per_s: float, *, num_blocks: int = 512, best: float = 10.0) -> Figure:
    return Figure(way, 4096, num_blocks, gb_per_s, best, 0.5)


def test_sizes_and_numbers_reach_from_the_smallest_to_the_largest() -> None:
    found = cases(POOL_BYTES)
    assert Case(4096, 1) in found
    assert Case(4096, 4096) in found
    assert Case(1 << 20, 64) in found
    assert max(case.num_bytes for case in found) <= POOL_BYTES
    assert max(case.num_bytes for case in cases(QUICK_BYTES)) <= QUICK_BYTES


@pytest.mark.parametrize("block_bytes", sorted({case.block_bytes for case in cases(POOL_BYTES)}))
def test_blocks_have_the_size_that_is_asked_for(block_bytes: int) -> None:
    assert layout_of(block_bytes).block_bytes == block_bytes


def test_blocks_of_a_run_are_distinct_and_runs_use_the_pool_in_turn() -> None:
    places = scattered(Case(1 << 20, 64), seed=1)
    runs = [next(places).tolist() for _ in range(5)]
    assert all(len(set(run)) == 64 for run in runs)
    assert len({block for run in runs[:4] for block in run}) == 256
    assert runs[4] == runs[0]
    assert runs[0] != sorted(runs[0])


def test_of_writing_and_reading_the_faster_counts() -> None:
    figures = [figure("NIXL write", 1.0), figure("NIXL read", 3.0), figure("NIXL read, tcp", 0.2)]
    rates = rates_of(figures)
    assert {way: some[Case(4096, 512)].median_gb_per_s for way, some in rates.items()} == {
        "NIXL": 3.0,
        "NIXL, tcp": 0.2,
    }


def test_a_claim_is_met_case_by_case() -> None:
    figures = [
        figure("memory copy", 10.0),
        figure("shm", 7.9),
        figure("memory copy", 10.0, num_blocks=4096),
        figure("shm", 8.1, num_blocks=4096),
        figure("memory copy", 10.0, num_blocks=1),
        figure("shm", 1.0, num_blocks=1),
    ]
    median, best = verdicts(figures, []).splitlines()
    assert "medians: from 1 MiB on 0.80 x, 1 of 2 cases met" in median
    assert "below 0.10 x, 0 of 1 cases met" in median
    assert "best runs: from 1 MiB on 1.00 x, 2 of 2 cases met" in best
    assert "512 x 4 KiB" in rate_table(figures)
    assert rate_table([]) == ""


@pytest.mark.parametrize(
    ("exposed_ms", "first_token_ms", "words"),
    [
        (5.0, 102.0, ["5.0%, at most 5%: met", "+2.0% of alone, within 3%: met"]),
        (5.1, 104.0, ["5.1%, at most 5%: not met", "+4.0% of alone, within 3%: not met"]),
    ],
)
def test_what_is_exposed_is_held_against_prefill(
    exposed_ms: float, first_token_ms: float, words: list[str]
) -> None:
    overlap = Overlap("tcp", 512, 100.0, exposed_ms, first_token_ms, 100.0, 9)
    said = verdicts([], [overlap])
    assert all(word in said for word in words), said
    assert "512" in overlap_table([overlap])
