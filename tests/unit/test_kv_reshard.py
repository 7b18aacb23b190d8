"""A plan writes each destination element exactly once, from ranks that share the work fairly."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.kv_cache.layout import KvLayout
from kv_transfer.balance import Job, share
from kv_transfer.group_layout import GroupLayout, RankBox
from kv_transfer.reshard import Box, Transfer, num_handover_bytes, reshard_plan
from tests.fakes.kv_layouts import group_layout

CELL_BYTES = 2 * 8 * 2


def a_full(num_layers: int, num_kv_heads: int) -> KvLayout:
    return KvLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=8,
        block_size_tokens=4,
        dtype="bfloat16",
    )


@st.composite
def layouts(draw: st.DrawFn, full: KvLayout, *, may_split_tokens: bool) -> GroupLayout:
    """Up to 7 ranks a shard with any layers and any order of heads; the last ones fill the gaps."""
    num_shards = draw(st.integers(1, 3)) if may_split_tokens else 1
    all_layers, all_heads = range(full.num_layers), range(full.num_kv_heads)
    boxes = []
    for shard in range(num_shards):
        missing = set(itertools.product(all_layers, all_heads))
        for _ in range(draw(st.integers(0, 6))):
            layers = draw(st.lists(st.sampled_from(all_layers), min_size=1, unique=True))
            heads = draw(st.lists(st.sampled_from(all_heads), min_size=1, unique=True))
            boxes.append(RankBox(tuple(sorted(layers)), tuple(heads), shard))
            missing -= set(itertools.product(layers, heads))
        if missing:
            rest = [sorted({cell[axis] for cell in missing}) for axis in (0, 1)]
            boxes.append(RankBox(tuple(rest[0]), tuple(draw(st.permutations(rest[1]))), shard))
    return GroupLayout(full, tuple(draw(st.permutations(boxes))))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[GroupLayout, GroupLayout]:
    full = a_full(draw(st.integers(1, 6)), draw(st.integers(1, 5)))
    sender = draw(layouts(full, may_split_tokens=True))
    return sender, draw(layouts(full, may_split_tokens=False))


def cells(box: Box, rank_box: RankBox) -> list[tuple[int, int]]:
    """What the box holds, as (layer, head) of the model; raises IndexError outside the rank's."""
    return [
        (rank_box.layers[layer], rank_box.kv_heads[head])
        for layer in range(box.first_layer, box.first_layer + box.num_layers)
        for head in range(box.first_head, box.first_head + box.num_heads)
    ]


@given(pairs())
def test_each_element_of_each_receiver_is_written_once_a_shard_from_its_equal(pair) -> None:
    sender, receiver = pair
    written: Counter[tuple[int, int, int, int]] = Counter()
    for transfer in reshard_plan(sender, receiver):
        source_box = sender.boxes[transfer.sender_rank]
        target_box = receiver.boxes[transfer.receiver_rank]
        source = cells(transfer.source, source_box)
        target = cells(transfer.target, target_box)
        assert source == target
        assert transfer.source.num_cells == len(source) > 0
        written.update((source_box.token_shard, transfer.receiver_rank, *cell) for cell in target)
    assert written == Counter(
        (shard, rank, layer, head)
        for shard in range(sender.num_token_shards)
        for rank, box in enumerate(receiver.boxes)
        for layer in box.layers
        for head in box.kv_heads
    )


@given(pairs())
def test_the_busiest_sender_does_no_more_than_it_must(pair) -> None:
    """No set of ranks has less to do: counting what only it can send bounds its busiest rank."""
    sender, receiver = pair
    plan = reshard_plan(sender, receiver)
    for shard in range(sender.num_token_shards):
        ranks = [r for r, box in enumerate(sender.boxes) if box.token_shard == shard]
        loads = Counter(dict.fromkeys(ranks, 0))
        for transfer in plan:
            if transfer.sender_rank in loads:
                loads[transfer.sender_rank] += transfer.source.num_cells
        holders = [
            {
                r
                for r in ranks
                if layer in sender.boxes[r].layers and head in sender.boxes[r].kv_heads
            }
            for box in receiver.boxes
            for layer in box.layers
            for head in box.kv_heads
        ]
        bound = max(
            -(-sum(holder <= set(few) for holder in holders) // size)
            for size in range(1, len(ranks) + 1)
            for few in itertools.combinations(ranks, size)
        )
        assert max(loads.values()) == bound


@given(pairs(), st.integers(0, 1000))
def test_the_plan_moves_the_bytes_of_the_formula(pair, num_tokens: int) -> None:
    sender, receiver = pair
    planned = Counter[int]()
    for transfer in reshard_plan(sender, receiver):
        shard = sender.boxes[transfer.sender_rank].token_shard
        planned[shard] += transfer.target.num_cells * CELL_BYTES * num_tokens
    expected = num_handover_bytes(receiver, num_tokens)
    assert set(planned.values()) == {expected}
    assert expected == num_tokens * sum(
        receiver.rank_layout(rank).bytes_per_token for rank in range(receiver.num_ranks)
    )


def test_equal_layouts_move_whole_pools_rank_to_rank() -> None:
    layout = group_layout(a_full(6, 4), tp=2, pp=2)
    whole = Box(0, 3, 0, 2)
    assert reshard_plan(layout, layout) == tuple(
        Transfer(rank, rank, whole, whole) for rank in range(4)
    )


def test_one_rank_to_one_rank_is_one_transfer() -> None:
    layout = GroupLayout.single(a_full(30, 3))
    assert reshard_plan(layout, layout) == (Transfer(0, 0, Box(0, 30, 0, 3), Box(0, 30, 0, 3)),)


def test_a_head_that_two_ranks_hold_is_sent_half_by_each() -> None:
    """The demo model at tp=2: 9 query heads, 3 KV heads; both ranks hold the middle one."""
    sender = group_layout(a_full(30, 3), num_query_heads=9, tp=2)
    assert [box.kv_heads for box in sender.boxes] == [(0, 1), (1, 2)]
    assert reshard_plan(sender, GroupLayout.single(sender.full)) == (
        Transfer(0, 0, Box(0, 30, 0, 1), Box(0, 30, 0, 1)),
        Transfer(0, 0, Box(0, 15, 1, 1), Box(0, 15, 1, 1)),
        Transfer(1, 0, Box(15, 15, 0, 1), Box(15, 15, 1, 1)),
        Transfer(1, 0, Box(0, 30, 1, 1), Box(0, 30, 2, 1)),
    )


def test_the_latent_of_every_rank_is_shared_out_by_layers() -> None:
    full = KvLayout(
        num_layers=8, num_kv_heads=1, head_dim=8, block_size_tokens=4, dtype="float32", num_parts=1
    )
    sender, receiver = group_layout(full, tp=4), group_layout(full, tp=2)
    plan = reshard_plan(sender, receiver)
    assert [t.source.num_layers for t in plan] == [4, 4, 4, 4]
    assert Counter(t.receiver_rank for t in plan) == {0: 2, 1: 2}
    assert num_handover_bytes(receiver, 10) == 2 * 8 * 10 * 8 * 4


def test_interleaved_stages_are_cut_at_their_ranges() -> None:
    full = a_full(8, 1)
    plan = reshard_plan(group_layout(full, pp=2, chunks=2), GroupLayout.single(full))
    assert [(t.sender_rank, t.source.first_layer, t.target.first_layer) for t in plan] == [
        (0, 0, 0),
        (0, 2, 4),
        (1, 0, 2),
        (1, 2, 6),
    ]


@given(
    st.lists(
        st.builds(
            lambda num_cells, ranks: Job(num_cells, tuple(sorted(ranks))),
            st.integers(1, 50),
            st.sets(st.integers(0, 5), min_size=1),
        ),
        max_size=12,
    )
)
def test_jobs_are_shared_out_whole_and_as_evenly_as_can_be(jobs: list[Job]) -> None:
    shares = share(jobs)
    loads = Counter[int]()
    for job, by_rank in zip(jobs, shares, strict=True):
        assert sum(by_rank.values()) == job.num_cells
        assert set(by_rank) <= set(job.ranks)
        assert min(by_rank.values()) >= 0
        loads.update(by_rank)
    bound = max(
        -(-sum(job.num_cells for job in jobs if set(job.ranks) <= set(few)) // size)
        for size in range(1, 7)
        for few in itertools.combinations(range(6), size)
    )
    assert max(loads.values(), default=0) == bound


@pytest.mark.parametrize(
    ("boxes", "problem"),
    [
        ((), "1 to 1024 ranks"),
        ((RankBox((0, 1), (0, 1)), RankBox((), (0,))), "rank 1 must hold distinct layers"),
        ((RankBox((0, 1), ()),), "rank 0 must hold distinct KV heads"),
        ((RankBox((0, 1, 1), (0, 1)),), "distinct layers"),
        ((RankBox((0, 1), (0, 2)),), r"KV heads of \[0, 2\)"),
        ((RankBox((0, 1), (-1, 0, 1)),), r"KV heads of \[0, 2\)"),
        ((RankBox((1, 0), (0, 1)),), "ascending"),
        ((RankBox((0, 1), (0, 1), 1),), "token shard 1 in a group of 1"),
        ((RankBox((0, 1), (0, 1), data_shard=1),), "data shard 1 in a group of 1"),
        (
            (RankBox((0, 1), (0, 1)), RankBox((0, 1), (1, 0), data_shard=1)),
            "must hold the same layers",
        ),
        (
            (RankBox((0, 1), (0, 1)), RankBox((0, 1), (0, 1), data_shard=2)) * 2,
            "must hold the same layers",
        ),
        (
            (RankBox((0, 1), (0, 1), 0), RankBox((0,), (0, 1), 1)),
            "shard 1 holds KV head 0 of layer 1",
        ),
        ((RankBox((0, 1), (0,)), RankBox((1,), (1,))), "KV head 1 of layer 0"),
        ((RankBox((0, 1), (0, 1)),) * 1025, "1 to 1024 ranks"),
    ],
)
def test_boxes_that_are_no_layout_are_refused(boxes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        GroupLayout(a_full(2, 2), boxes)


def test_a_layout_that_lists_too_much_is_refused() -> None:
    full = a_full(4096, 2)
    box = RankBox(tuple(range(4096)), (0, 1))
    with pytest.raises(ValueError, match="above 131072"):
        GroupLayout(full, (box,) * 33)


def test_other_models_have_no_plan() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\) there, \(2, 3\) here"):
        reshard_plan(GroupLayout.single(a_full(2, 2)), GroupLayout.single(a_full(2, 3)))


def test_a_receiver_with_split_tokens_has_no_plan() -> None:
    full = a_full(2, 2)
    with pytest.raises(ValueError, match="all tokens"):
        reshard_plan(GroupLayout.single(full), group_layout(full, sp=2))
