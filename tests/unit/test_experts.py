"""Dispatch to experts and back, against a plain loop over tokens; routers' bad configurations."""

import dataclasses
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.config import ModelConfig, RopeConfig
from engine.checkpoint.form import ExpertsForm, RouterForm
from engine.errors import CheckpointError
from engine.parallel.axes import AxisGroup
from engine.parallel.expert_placement import ExpertPlacement
from engine.parallel.experts import ExpertExchange
from engine.parallel.fit import check_layout_fits
from engine.parallel.layout import ParallelLayout

CONFIG = ModelConfig(
    architecture="MixtralForCausalLM",
    vocab_size=8,
    hidden_size=4,
    intermediate_size=4,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    max_context_tokens=8,
    rms_norm_eps=1e-6,
    rope=RopeConfig(),
    windows=(None,),
)
NUM_EXPERTS, NUM_CHOSEN, SIZE = 6, 3, 5


def routing(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(num_tokens, SIZE, generator=generator)
    order_TE = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).argsort(-1)
    weight_TK = torch.rand(num_tokens, NUM_CHOSEN, generator=generator)
    return x_TD, order_TE[:, :NUM_CHOSEN], weight_TK


def expert(index: int, x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x * (index + 1))


def expected_of(
    x_TD: torch.Tensor, expert_TK: torch.Tensor, weight_TK: torch.Tensor
) -> torch.Tensor:
    y_TD = torch.zeros_like(x_TD)
    for token, (ids, weights) in enumerate(zip(expert_TK, weight_TK, strict=True)):
        for index, weight in zip(ids, weights, strict=True):
            y_TD[token] += weight * expert(int(index), x_TD[token])
    return y_TD


class ThreadCollectives:
    """all_to_all among threads of this process; nothing else."""

    name = "threads"

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, sent: list[Any]) -> None:
        self.rank, self.size, self.barrier, self.sent = rank, size, barrier, sent

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        self.sent[self.rank] = x.split(list(send_lengths))
        self.barrier.wait(10)
        parts = [self.sent[rank][self.rank] for rank in range(self.size)]
        assert [len(part) for part in parts] == list(receive_lengths)
        torch.cat(parts, out=out)
        self.barrier.wait(10)


Routing = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def through(
    placement: ExpertPlacement, routings: Sequence[Routing], num_copies: int
) -> tuple[list[torch.Tensor], list[dict[int, int]]]:
    """What each rank adds, and how many rows each of its experts had; ranks are threads."""
    size = len(routings)
    barrier, sent = threading.Barrier(size), [None] * size

    def compute(rank: int) -> tuple[torch.Tensor, dict[int, int]]:
        collectives: Any = ThreadCollectives(rank, size, barrier, sent)
        exchange = ExpertExchange(placement, AxisGroup(rank, size, collectives))
        x_RD, counts, handle = exchange.dispatch(*routings[rank], num_copies=num_copies)
        assert sum(counts) == len(x_RD)
        here = placement.experts_of[rank]
        parts = [expert(e, part) for e, part in zip(here, x_RD.split(counts), strict=True)]
        return exchange.combine(torch.cat(parts), handle), dict(zip(here, counts, strict=True))

    with ThreadPoolExecutor(size) as pool:
        results = list(pool.map(compute, range(size)))
    return [y for y, _ in results], [counts for _, counts in results]


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 6])
def test_ranks_with_the_same_tokens_add_up(num_tokens: int, num_ranks: int) -> None:
    routed = routing(num_tokens)
    placement = ExpertPlacement.even(NUM_EXPERTS, num_ranks)
    parts, _ = through(placement, [routed] * num_ranks, num_ranks)
    torch.testing.assert_close(sum(parts), expected_of(*routed))


REPLICAS = ExpertPlacement(((0, 2), (0, 1, 5), (1, 2), (0, 3, 4)))


@pytest.mark.parametrize("placement", [ExpertPlacement.even(NUM_EXPERTS, 4), REPLICAS])
@pytest.mark.parametrize("num_copies", [1, 2])
def test_ranks_with_other_tokens_send_them_to_their_experts(
    placement: ExpertPlacement, num_copies: int
) -> None:
    """Any number of tokens, none included; each group of copies adds up to its own tokens."""
    lengths = [7, 0, 1, 20][: 4 // num_copies]
    groups = [routing(length, seed=length) for length in lengths]
    parts, counts = through(
        placement, [routed for routed in groups for _ in range(num_copies)], num_copies
    )
    for index, routed in enumerate(groups):
        copies = parts[index * num_copies : (index + 1) * num_copies]
        torch.testing.assert_close(sum(copies), expected_of(*routed))
    chosen = torch.cat([expert_TK.flatten() for _, expert_TK, _ in groups])
    for index in range(NUM_EXPERTS):
        assert sum(each.get(index, 0) for each in counts) == (chosen == index).sum()


def test_all_tokens_of_all_ranks_may_want_one_rank() -> None:
    x_TD, _, weight_TK = routing(9)
    routed = (x_TD, torch.tensor([[2, 0, 1]]).expand(9, 3), weight_TK)
    parts, counts = through(ExpertPlacement.even(NUM_EXPERTS, 2), [routed, routed], 1)
    assert counts[1] == {3: 0, 4: 0, 5: 0}
    for part in parts:
        torch.testing.assert_close(part, expected_of(*routed))


def test_replicas_share_the_tokens() -> None:
    x_TD, _, weight_TK = routing(12)
    routed = (x_TD, torch.tensor([[0, 3, 5]]).expand(12, 3), weight_TK)
    _, counts = through(REPLICAS, [routed] * 4, 1)
    assert [each.get(0) for each in counts] == [16, 16, None, 16]


def test_a_token_has_the_same_bits_in_every_batch_and_on_any_ranks() -> None:
    routed = routing(40)
    (whole,), _ = through(ExpertPlacement.even(NUM_EXPERTS, 1), [routed], 1)
    placement = ExpertPlacement.even(NUM_EXPERTS, 3)
    for rows in (slice(0, 1), slice(7, 20)):
        part = tuple(x[rows] for x in routed)
        parts, _ = through(placement, [routed, part, routed], 1)  # type: ignore[list-item]
        assert torch.equal(parts[0], whole)
        assert torch.equal(parts[1], whole[rows])


def test_a_rank_without_tokens_adds_nothing() -> None:
    x_TD, _, weight_TK = routing(4)
    routed = (x_TD, torch.tensor([[0, 1, 2]]).expand(4, 3), weight_TK)
    parts, _ = through(ExpertPlacement.even(NUM_EXPERTS, 2), [routed, routed], 2)
    assert torch.equal(parts[1], torch.zeros(4, SIZE))


@given(st.integers(1, 40), st.integers(1, 12))
def test_experts_are_spread_evenly(num_experts: int, num_ranks: int) -> None:
    if num_ranks > num_experts:
        with pytest.raises(ValueError, match=rf"\({num_experts}\) .* over {num_ranks} ranks"):
            ExpertPlacement.even(num_experts, num_ranks)
        return
    placement = ExpertPlacement.even(num_experts, num_ranks)
    assert placement.is_plain
    assert max(placement.num_places) - min(placement.num_places) <= 1
    assert sum(placement.num_places) == num_experts


@given(
    st.lists(st.integers(0, 1000), min_size=1, max_size=30), st.integers(1, 8), st.integers(0, 4)
)
def test_a_balanced_placement_has_all_experts_within_its_places(
    num_tokens: list[int], num_ranks: int, num_spare: int
) -> None:
    num_ranks = min(num_ranks, len(num_tokens))
    placement = ExpertPlacement.balanced(num_tokens, num_ranks, num_spare=num_spare)
    assert len(placement.places_of) == len(num_tokens)
    even = ExpertPlacement.even(len(num_tokens), num_ranks)
    for count, least in zip(placement.num_places, even.num_places, strict=True):
        assert 1 <= count <= min(least + num_spare, len(num_tokens))
    if num_spare == 0:
        assert placement.num_places == even.num_places


def test_hot_experts_are_parted_and_the_hottest_stand_on_several_ranks() -> None:
    """What each rank has to do, where the tokens of the two hottest were three quarters."""
    num_tokens = [600, 300, 50, 50, 50, 50, 50, 50]

    def loads(placement: ExpertPlacement) -> list[float]:
        return [
            sum(num_tokens[e] / len(placement.places_of[e]) for e in experts)
            for experts in placement.experts_of
        ]

    assert loads(ExpertPlacement.even(8, 4)) == [900, 100, 100, 100]
    assert max(loads(ExpertPlacement.balanced(num_tokens, 4, num_spare=0))) == 650
    with_replicas = ExpertPlacement.balanced(num_tokens, 4, num_spare=1)
    assert max(loads(with_replicas)) == 350
    assert [len(places) for places in with_replicas.places_of[:3]] == [4, 2, 1]


@pytest.mark.parametrize(
    ("experts_of", "words"),
    [
        (((0, 1), ()), "has no expert"),
        (((0, 2), (3,)), "expert 1 stands on no rank"),
        (((0, 0), (1,)), "not ascending"),
    ],
)
def test_a_placement_without_all_experts_is_refused(
    experts_of: tuple[tuple[int, ...], ...], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        ExpertPlacement(experts_of)


@pytest.mark.parametrize(
    ("text", "form", "words"),
    [
        ("ep=8", "six", r"ep=8 needs ep at most 6: .* the 6 experts .*; use ep=6,dp=6"),
        ("tp=8,ep=8", "six", r"ep=8 needs ep at most 6: .*; use tp=8,ep=4"),
        ("ep=2", None, r"ep=2 needs ep at most 1: .*of which it has none; use tp=1"),
    ],
)
def test_more_ranks_than_experts_are_refused(text: str, form: str | None, words: str) -> None:
    experts = None if form is None else dataclasses.replace(FORM, num_experts=6)
    config = dataclasses.replace(
        CONFIG,
        num_heads=8,
        intermediate_size=64,
        vocab_size=64,
        form=dataclasses.replace(CONFIG.form, experts=experts),
    )
    with pytest.raises(ValueError, match=words):
        check_layout_fits(config, ParallelLayout.parse(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=8", r"expert_tp=8 needs expert_tp at most 4: .* 4 features .*; use tp=8,ep=2 or tp=4"),
        (
            "tp=8,dp=2",
            r"expert_tp=8 needs expert_tp at most 4: .*; use tp=8,ep=4,dp=2 or tp=4,dp=2",
        ),
        ("tp=4,pp=2", r"tp=4 needs tp at most 2: .* 64 features \(2 of a shared expert\)"),
    ],
)
def test_more_ranks_than_an_expert_has_features_are_refused(text: str, words: str) -> None:
    config = dataclasses.replace(
        CONFIG,
        num_heads=8,
        num_layers=8,
        windows=(None,) * 8,
        intermediate_size=64,
        vocab_size=64,
        form=dataclasses.replace(
            CONFIG.form, experts=dataclasses.replace(FORM, shared_size=2 if "pp" in text else 0)
        ),
    )
    with pytest.raises(ValueError, match=words) as refused:
        check_layout_fits(config, ParallelLayout.parse(text))
    for near in str(refused.value).rpartition("use ")[2].split(" or "):
        check_layout_fits(config, ParallelLayout.parse(near))


FORM = ExpertsForm(num_experts=8, num_chosen=2, intermediate_size=4, layers=frozenset({0}))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"num_chosen": 9}, r"experts per token \(9\) must be in \[1, .*\(8\)"),
        ({"num_experts": 1 << 20}, "at most 4096"),
        ({"router": {"num_groups": 3}}, r"\(8\) must be a multiple of n_group \(3\)"),
        ({"router": {"num_groups": 2, "num_chosen_groups": 3}}, r"topk_group \(3\)"),
        ({"router": {"num_groups": 8}}, r"experts per token \(2\) must fit"),
        ({"router": {"num_groups": 8, "num_chosen_groups": 8, "group_score": "best_two"}},
         "need two each"),
    ],
)  # fmt: skip
def test_mixtures_that_cannot_be_are_refused(changes: dict[str, Any], match: str) -> None:
    changes = dict(changes)
    router = changes.pop("router", {})
    with pytest.raises(CheckpointError, match=match):
        dataclasses.replace(FORM, **changes, router=RouterForm(**router))
