"""Dispatch to experts and back, against a plain loop over tokens; routers' bad configurations."""

import dataclasses
from typing import Any

import pytest
import torch

from engine.checkpoint.config import ModelConfig, RopeConfig
from engine.checkpoint.form import ExpertsForm, RouterForm
from engine.errors import CheckpointError
from engine.kernels.torch_kernels import TorchKernels
from engine.layers.moe import MoeMlp
from engine.parallel.axes import AxisGroup, ParallelAxes
from engine.parallel.experts import ReplicatedDispatch

CPU = torch.device("cpu")
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


def through(axis: AxisGroup, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    dispatch = ReplicatedDispatch(NUM_EXPERTS, axis)
    x_RD, counts, handle = dispatch.dispatch(x, ids, w)
    assert sum(counts) == len(x_RD)
    parts = x_RD.split(counts)
    y_RD = torch.cat([expert(dispatch.first + e, part) for e, part in enumerate(parts)])
    return dispatch.combine(y_RD, handle)


@pytest.mark.parametrize("num_tokens", [1, 2, 33])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_every_token_gets_the_weighted_sum_of_its_experts(num_tokens: int, num_ranks: int) -> None:
    x_TD, expert_TK, weight_TK = routing(num_tokens)
    expected = torch.stack(
        [
            sum(w * expert(int(e), x) for e, w in zip(ids, ws, strict=True))
            for x, ids, ws in zip(x_TD, expert_TK, weight_TK, strict=True)
        ]
    )
    ranks = [AxisGroup(rank, num_ranks) for rank in range(num_ranks)]
    actual = sum(through(axis, x_TD, expert_TK, weight_TK) for axis in ranks)
    torch.testing.assert_close(actual, expected)


def test_a_rank_without_tokens_adds_nothing() -> None:
    x_TD, _, weight_TK = routing(4)
    expert_TK = torch.tensor([[0, 1, 2]]).expand(4, 3)
    second = AxisGroup(1, 2)
    assert torch.equal(through(second, x_TD, expert_TK, weight_TK), torch.zeros(4, SIZE))


def test_a_token_has_the_same_result_in_every_batch() -> None:
    x_TD, expert_TK, weight_TK = routing(40)
    whole = through(AxisGroup(), x_TD, expert_TK, weight_TK)
    for rows in (slice(0, 1), slice(7, 20)):
        part = through(AxisGroup(), x_TD[rows], expert_TK[rows], weight_TK[rows])
        assert torch.equal(part, whole[rows])


def test_experts_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"number of experts \(6\) must divide .* \(4\)"):
        ReplicatedDispatch(NUM_EXPERTS, AxisGroup(0, 4))


def test_experts_beyond_a_tensor_group_are_refused() -> None:
    axes = ParallelAxes(dp=AxisGroup(0, 2), ep=AxisGroup(0, 2))
    with pytest.raises(ValueError, match="ep=2 reaches beyond the 1 ranks"):
        MoeMlp(CONFIG, FORM, layer="model.layers.0", axes=axes, kernels=TorchKernels(CPU))


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
