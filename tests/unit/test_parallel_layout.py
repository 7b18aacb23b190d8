import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.parallel import Axis, ParallelAxes, ParallelLayout, RankEnvironment, join_group


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("tp=2,pp=2", ParallelLayout(tp=2, pp=2)),
        (" pp = 3 ", ParallelLayout(pp=3)),
        ("", ParallelLayout()),
        ("1", ParallelLayout()),
        ("ep=4", ParallelLayout(dp=4, ep=4)),
        ("tp=2,ep=4", ParallelLayout(tp=2, dp=2, ep=4)),
        ("tp=2,ep=2", ParallelLayout(tp=2, ep=2)),
        ("tp=4,ep=2", ParallelLayout(tp=4, ep=2)),
        ("sp=2,ep=2", ParallelLayout(sp=2, ep=2)),
        ("pp=2,interleave=3", ParallelLayout(pp=2, interleave=3)),
    ],
)
def test_a_layout_is_read_from_text(text: str, layout: ParallelLayout) -> None:
    assert ParallelLayout.parse(text) == layout
    assert ParallelLayout.parse(str(layout)) == layout


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp", "'tp' in 'tp' is not <axis>=<ranks>"),
        ("tq=2", "axis of tp, pp, ep, sp, dp"),
        ("tp=2,interleave=2", "interleave=2 needs a pipeline"),
        ("tp=2,tp=4", "tp stands twice"),
        ("tp=two", "whole number of ranks, got 'two'"),
        ("tp=-1", "whole number of ranks, got '-1'"),
        ("tp=0", r"tp must be in \[1, 1024\], got 0"),
        ("tp=0,ep=2", r"tp must be in \[1, 1024\], got 0"),
        ("tp=99999999999", "whole number of ranks"),
        ("tp=64,pp=64", "has 4096 ranks, more than 1024"),
        ("tp=4,ep=3", "ep=3 does not fit tp=4,ep=3.* one of 1, 2, 4"),
        ("dp=4,ep=2", r"dp \* sp = 4 that divides 4: one of 1, 4"),
        ("dp=2,tp=4,ep=2,pp=2,sp=2", "one of 1, 4, 8, 16"),
    ],
)
def test_a_bad_layout_says_what_to_change(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelLayout.parse(text)


layouts = st.builds(
    lambda tp, pp, sp, dp, part: ParallelLayout(
        tp=tp,
        pp=pp,
        sp=sp,
        dp=dp,
        ep=dp * sp * max(d for d in range(1, tp + 1) if tp % d == 0 and d <= part),
    ),
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
)


@settings(deadline=None)  # other tests share the cores
@given(layouts)
def test_every_rank_stands_in_one_group_of_each_axis(layout: ParallelLayout) -> None:
    for axis in Axis:
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(layout.num_ranks))
        assert {len(group) for group in groups} == {layout.size(axis)}
        for group in groups:
            assert [layout.index(axis, rank) for rank in group] == list(range(len(group)))


@settings(deadline=None)  # other tests share the cores
@given(layouts)
def test_the_axes_tell_ranks_apart(layout: ParallelLayout) -> None:
    for axes in ((Axis.TP, Axis.PP, Axis.SP, Axis.DP), (Axis.EP, Axis.EXPERT_TP, Axis.PP)):
        if Axis.EP in axes and layout.ep == 1:
            continue
        places = {
            tuple(layout.index(axis, rank) for axis in axes) for rank in range(layout.num_ranks)
        }
        assert len(places) == layout.num_ranks


@settings(deadline=None)  # other tests share the cores
@given(layouts)
def test_an_expert_is_split_inside_one_tensor_group(layout: ParallelLayout) -> None:
    for group in layout.groups(Axis.EXPERT_TP):
        assert set(group) <= set(layout.group(Axis.TP, group[0]))


def test_tensor_ranks_stand_side_by_side() -> None:
    layout = ParallelLayout(tp=2, pp=2, dp=2)
    assert layout.groups(Axis.TP) == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert layout.groups(Axis.PP) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert layout.groups(Axis.DP) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_experts_lie_across_data_ranks_of_one_stage() -> None:
    layout = ParallelLayout(tp=2, pp=2, dp=2, ep=2)
    assert layout.groups(Axis.EP) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert layout.groups(Axis.EXPERT_TP) == ((0, 1), (2, 3), (4, 5), (6, 7))
    layout = ParallelLayout(tp=2, pp=2, dp=2, ep=4)
    assert layout.groups(Axis.EP) == ((0, 1, 4, 5), (2, 3, 6, 7))


def test_places_without_collectives_are_enough_to_plan() -> None:
    axes = ParallelAxes.from_layout(ParallelLayout(tp=2, pp=3), 5)
    assert (axes.tp.rank, axes.tp.size, axes.pp.rank, axes.pp.size) == (1, 2, 2, 3)
    assert axes.expert_tp.size == 2
    with pytest.raises(ValueError, match=r"rank must be in \[0, 6\) for tp=2,pp=3, got 6"):
        ParallelAxes.from_layout(ParallelLayout(tp=2, pp=3), 6)


ENVIRONMENT = {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29500",
}


def test_the_environment_is_read() -> None:
    environment = RankEnvironment.read(ENVIRONMENT)
    assert environment == RankEnvironment(
        rank=1, world_size=3, local_rank=1, master_address="10.0.0.7", master_port=29500
    )
    assert RankEnvironment.read({"WORLD_SIZE": "3"}) is None


def test_torchrun_keeps_the_store_and_counts_restarts() -> None:
    extra = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "2"}
    environment = RankEnvironment.read(ENVIRONMENT | extra)
    assert environment is not None
    assert (environment.is_store_elsewhere, environment.attempt) == (True, 2)
    assert RankEnvironment.read(environment.variables()) == environment


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"WORLD_SIZE": None}, "WORLD_SIZE is not"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not"),
        ({"RANK": "one"}, "RANK must be a whole number, got 'one'"),
        ({"RANK": "3"}, r"RANK must be in \[0, WORLD_SIZE=3\), got 3"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT must be in"),
    ],
)
def test_a_bad_environment_is_named(change: dict[str, str | None], words: str) -> None:
    environment = {k: v for k, v in (ENVIRONMENT | change).items() if v is not None}
    with pytest.raises(ValueError, match=words):
        RankEnvironment.read(environment)


def test_a_layout_of_another_size_is_refused_with_both_sides() -> None:
    environment = RankEnvironment.read(ENVIRONMENT)
    with pytest.raises(ValueError, match="WORLD_SIZE is 3, but the layout tp=2,pp=2 has 4 ranks"):
        join_group(ParallelLayout(tp=2, pp=2), environment)


def test_several_ranks_need_an_environment() -> None:
    with pytest.raises(ValueError, match="torchrun --nproc-per-node 2"):
        join_group(ParallelLayout(tp=2))


def test_one_rank_joins_alone() -> None:
    with join_group(ParallelLayout()) as group:
        assert group.axes.world.broadcast_bytes(b"step", max_bytes=10) == b"step"
        assert group.transports == {}


def test_interleaved_stages_are_refused_on_cuda_before_anything_is_joined() -> None:
    place = RankEnvironment(
        rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=1
    )
    layout = ParallelLayout(pp=2, interleave=2)
    with pytest.raises(ValueError, match=r"pp=2,interleave=2 .* NCCL .*; use pp=2 without"):
        join_group(layout, place, device=torch.device("cuda"))
