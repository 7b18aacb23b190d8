"""Each way to split a model over ranks gives what transformers gives, in float32.

A new family is a row of CASES.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import default_cache_dir
from engine.checkpoint.demo import DEMO_FILE_NAME
from engine.kernels import choose_kernels
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.models.build import load_model
from engine.parallel import Axis, CollectivesConfig, RankGroup, kv_exchange, overlap
from engine.parallel.kv_exchange import KvExchange
from engine.runtime.runner import ModelRunner
from engine.scheduling.micro_batch import cut_into_micro_batches
from engine.scheduling.step_plan import ScheduledChunk, StepPlan
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.distributed.ranks import run_ranks

BLOCK_SIZE = 16
NUM_BLOCKS = 32
RELATIVE_TOLERANCE = 1e-4
NUM_GREEDY = 12
CPU = torch.device("cpu")
TCP = CollectivesConfig(has_shared_memory=False)


@dataclass(frozen=True)
class Case:
    """One checkpoint to compare."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)


UNEVEN = {
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 72,
    "head_dim": 8,
    "intermediate_size": 100,
    "vocab_size": VOCAB_SIZE + 5,
}
WIDE = {"num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": 8}
LATENT = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40,
    "n_shared_experts": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8,
    "v_head_dim": 20, "head_dim": 8, "num_key_value_heads": 4,
}  # fmt: skip
CASES = {
    "llama": Case("llama", WIDE),
    "llama-bias": Case("llama", {**WIDE, "attention_bias": True, "mlp_bias": True}),
    "llama-uneven": Case("llama", {**UNEVEN, "num_hidden_layers": 5}),
    "llama-uneven-tied": Case(
        "llama", {**UNEVEN, "tie_word_embeddings": True, "num_hidden_layers": 4}
    ),
    "qwen2": Case("qwen2", WIDE),
    "qwen2-tied": Case("qwen2", {**UNEVEN, "tie_word_embeddings": True}),
    "qwen3": Case("qwen3", {**WIDE, "num_key_value_heads": 4}),
    "mistral-window": Case("mistral", {**WIDE, "sliding_window": 24}),
    "gemma2": Case(
        "gemma2",
        {**WIDE, "sliding_window": 24, "query_pre_attn_scalar": 24, "tie_word_embeddings": True},
    ),
    "gemma3": Case("gemma3_text", {**WIDE, "sliding_window": 24, "num_hidden_layers": 7}),
    "phi3": Case("phi3", UNEVEN),
    "olmo2": Case("olmo2", WIDE),
    "mixtral": Case("mixtral", {"num_local_experts": 8, "moe_intermediate_size": 40}),
    "deepseek-v2": Case("deepseek_v2", LATENT),
    "deepseek-v3": Case("deepseek_v3", LATENT),
    "qwen2-moe": Case(
        "qwen2_moe",
        {"num_experts": 8, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
    ),
    "qwen3-moe": Case("qwen3_moe", {"num_experts": 8, "moe_intermediate_size": 40}),
    "gpt-oss": Case("gpt_oss", {"num_local_experts": 8, "sliding_window": 24}),
    "granite": Case(
        "granite",
        {
            **WIDE,
            "attention_bias": True,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 6.0,
            "logits_scaling": 3.0,
        },
    ),
}
LAYOUTS = {
    "llama": (
        "tp=2", "tp=3", "tp=4", "tp=8", "pp=2", "pp=3", "pp=4", "pp=8",
        "tp=2,pp=2", "tp=3,pp=2", "tp=2,pp=3", "tp=2,pp=4", "tp=4,pp=2",
        "pp=2,interleave=2", "pp=2,interleave=4", "pp=4,interleave=2", "tp=2,pp=2,interleave=2",
        "sp=2", "sp=3", "sp=4", "tp=2,sp=2", "sp=2,pp=2", "tp=2,sp=2,pp=2", "tp=2,sp=4",
    ),
    "llama-bias": ("tp=2", "tp=3", "tp=2,pp=2"),
    "llama-uneven": (
        "sp=2", "tp=2,sp=2",
        "tp=2", "tp=3", "tp=4", "tp=5", "tp=6", "tp=7", "tp=8", "tp=9", "pp=5", "tp=3,pp=2",
    ),
    "llama-uneven-tied": ("tp=2", "pp=2", "pp=2,interleave=2", "pp=3", "tp=2,pp=2"),
    "qwen2": ("tp=2", "tp=3", "tp=4", "pp=2", "tp=2,pp=2"),
    "qwen2-tied": ("tp=2", "tp=4", "pp=2", "tp=2,pp=3"),
    "qwen3": ("sp=2", "tp=2", "tp=3", "tp=4", "pp=3", "tp=2,pp=2"),
    "mistral-window": ("sp=2", "tp=3,sp=2", "tp=2", "tp=3", "tp=4", "pp=2", "tp=2,pp=4"),
    "gemma2": ("tp=2", "tp=3", "pp=3", "tp=2,pp=2"),
    "gemma3": ("sp=3", "pp=2,interleave=2", "tp=3", "pp=4", "tp=2,pp=2"),
    "phi3": ("tp=2", "tp=4", "pp=2", "tp=3,pp=2"),
    "olmo2": ("tp=2", "tp=3", "tp=4", "pp=2", "tp=3,pp=2"),
    "mixtral": (
        "sp=2", "tp=2", "tp=3", "pp=3", "tp=3,pp=2", "tp=2,ep=2", "tp=4,ep=2", "tp=4,ep=4",
        "tp=2,pp=2,ep=2", "tp=3,ep=3", "sp=2,ep=2", "sp=3,ep=3", "tp=2,sp=2,ep=2", "tp=2,sp=2,ep=4",
        "tp=2,sp=2,pp=2,ep=4", "ep=2", "ep=3", "ep=4", "tp=2,ep=4", "tp=2,dp=2,ep=2",
        "pp=2,dp=2,ep=2", "sp=2,ep=4", "tp=2,sp=2,dp=2,ep=8", "dp=2",
    ),
    "qwen2-moe": ("tp=2", "tp=3", "tp=2,ep=2", "tp=4,ep=2", "sp=2,ep=2", "tp=2,sp=2,ep=4", "ep=3",
        "tp=2,ep=4"),
    "qwen3-moe": (
        "tp=2", "tp=4,ep=4", "tp=2,pp=3,ep=2", "sp=4,ep=4", "ep=2", "tp=2,pp=2,dp=2,ep=4",
    ),
    "gpt-oss": ("tp=2", "tp=3", "tp=4,ep=2", "tp=2,pp=2,ep=2", "tp=2,sp=2,ep=2", "ep=4"),
    "deepseek-v3": (
        "tp=2", "tp=2,ep=2", "tp=4,ep=2", "tp=3,pp=3", "tp=3,ep=3", "tp=2,sp=2,ep=4", "ep=4",
        "tp=2,dp=2,ep=2",
    ),
    "deepseek-v2": (
        "sp=2", "tp=2,sp=2", "tp=2", "tp=3", "tp=4", "pp=3", "tp=3,pp=2", "sp=2,ep=2", "ep=2",
        "tp=2,ep=4",
    ),
    "granite": ("tp=2", "pp=3", "tp=3,pp=2"),
}  # fmt: skip


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


PROMPT = prompt_of(70)
ANSWER = prompt_of(4, seed=9)


class Steps:
    """Runs one sequence at a time on this rank; blocks are out of order."""

    def __init__(self, group: RankGroup, path: str, dtype: str) -> None:
        kernels = choose_kernels(CPU, getattr(torch, dtype), 1)
        model = load_model(Path(path), kernels=kernels, dtype=dtype, axes=group.axes)
        layout = KvLayout(
            num_layers=len(model.stage_layers),
            num_kv_heads=len(model.kv_heads),
            head_dim=model.config.head_dim,
            num_parts=model.config.num_kv_parts,
            block_size_tokens=BLOCK_SIZE,
            dtype=dtype,
        )
        pool = KvPool(layout, NUM_BLOCKS, CPU)
        pool.blocks_PLJGCA.fill_(torch.nan)
        self.world = group.axes.world
        self.data = group.axes.dp
        self.shard_ranks = group.layout.num_ranks // group.layout.dp
        self.drawing_rank = (group.layout.pp - 1) * group.layout.tp * group.layout.sp
        """Of the first data shard."""
        self.runner = ModelRunner(model, pool, CPU, group.axes.pp)
        self.num_micro_batches = 1 if model.num_ranges == 1 else 3
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
        self.blocks = (tuple(order[::2]), tuple(order[1::2]))

    def close(self) -> None:
        self.runner.pool.close()

    def last_logits(self, *parts: tuple[int, int, Sequence[int]]) -> torch.Tensor:
        """Compute the tokens that follow the first ones of sequences; on ranks that have them,
        the logits of each sequence's last. Data shards take turns with sequences."""
        chunks = [
            ScheduledChunk(
                str(sequence),
                first,
                tuple(tokens),
                self.blocks[sequence],
                len(PROMPT),
                is_drawing=True,
            )
            for sequence, first, tokens in parts
            if sequence % self.data.size == self.data.rank
        ]
        batches: tuple[StepPlan, ...] = ()
        if chunks:
            batches = cut_into_micro_batches(StepPlan(tuple(chunks)), self.num_micro_batches)
        num_passes = len(batches) if self.data.size == 1 else self.num_micro_batches
        step, _ = self.runner.announce(StepPlan(tuple(chunks)))
        own_BV = self.runner.run(batches, num_passes, 1, step, is_watched=False)
        return own_BV if self.data.size == 1 else self.shared(own_BV, [part[0] for part in parts])

    def shared(self, own_BV: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
        """The logits of all data shards, on every rank."""
        own, rows = iter(own_BV), []
        for sequence in sequences:
            shard = sequence % self.data.size
            source = shard * self.shard_ranks + self.drawing_rank
            row_V = torch.empty(self.runner.model.config.vocab_size)
            if self.world.rank == source:
                row_V.copy_(next(own))
            rows.append(self.world.broadcast(row_V, source))
        return torch.stack(rows)

    def greedy(self, sequence: int, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """Draw on the first rank of the last stage, and tell the others."""
        drawn: list[int] = []
        first, tokens = 0, list(prompt)
        for _ in range(num_tokens):
            logits_1V = self.last_logits((sequence, first, tokens))
            token = torch.zeros(1, dtype=torch.int64)
            if self.world.rank == self.drawing_rank:
                token[0] = logits_1V.argmax()
            self.world.broadcast(token, self.drawing_rank)
            drawn.append(int(token))
            first, tokens = first + len(tokens), [int(token)]
        return drawn


def compute(group: RankGroup, path: str, dtype: str = "float32") -> dict[str, Any]:
    """The logits of a prompt in one piece and in chunks, then of decode steps; a greedy answer."""
    steps = Steps(group, path, dtype)
    after = [(len(PROMPT) + index, [token]) for index, token in enumerate(ANSWER)]
    logits = [steps.last_logits((0, 0, PROMPT))]
    logits += [steps.last_logits((0, *step)) for step in after[:-1]]
    steps.last_logits((1, 0, PROMPT[:17]))
    steps.last_logits((1, 17, PROMPT[17:18]))
    both = steps.last_logits((0, *after[-1]), (1, 18, PROMPT[18:58]))
    logits += [both[:1], steps.last_logits((1, 58, PROMPT[58:]))]
    logits += [steps.last_logits((1, *step)) for step in after]
    answer = steps.greedy(0, PROMPT, NUM_GREEDY)
    steps.close()
    return {
        "logits": torch.cat(logits) if logits[0].numel() else None,
        "answer": answer,
        "max_num_parts": steps.runner.model.num_parts(len(PROMPT) // steps.num_micro_batches),
    }


def expected_of(path: Path) -> tuple[torch.Tensor, list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        logits_TV = model(torch.tensor([[*PROMPT, *ANSWER]])).logits[0, len(PROMPT) - 1 :]
        answer: list[int] = []
        tokens = list(PROMPT)
        cache = None
        for _ in range(NUM_GREEDY):
            out = model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
            cache, tokens = out.past_key_values, [int(out.logits[0, -1].argmax())]
            answer += tokens
    return torch.cat((logits_TV, logits_TV)), answer


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Path and what is expected of each case, made when first asked for."""
    made: dict[str, Any] = {"root": tmp_path_factory.mktemp("checkpoints")}
    return made


def checkpoint_of(name: str, made: dict[str, Any]) -> tuple[Path, torch.Tensor, list[int]]:
    if name not in made:
        case = CASES[name]
        path = tiny_checkpoint(made["root"] / name, case.family, **case.overrides)
        made[name] = (path, *expected_of(path))
    found: tuple[Path, torch.Tensor, list[int]] = made[name]
    return found


def compute_each(group: RankGroup, paths: Sequence[str]) -> list[dict[str, Any]]:
    return [compute(group, path) for path in paths]


@pytest.mark.parametrize("layout", sorted({layout for row in LAYOUTS.values() for layout in row}))
def test_split_over_ranks_equals_transformers(layout: str, checkpoints: dict[str, Any]) -> None:
    names = [name for name, row in LAYOUTS.items() if layout in row]
    cases = [checkpoint_of(name, checkpoints) for name in names]
    found = run_ranks(layout, compute_each, [str(path) for path, _, _ in cases])
    for index, (name, (_, expected, answer)) in enumerate(zip(names, cases, strict=True)):
        ranks = [rank[index] for rank in found]
        assert all(rank["answer"] == answer for rank in ranks), name
        assert_logits_near(ranks, expected, name)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("llama-uneven", "tp=3"),
        ("llama-uneven", "tp=2,pp=2"),
        ("deepseek-v3", "ep=2"),
        ("mixtral", "tp=2,sp=2,ep=2"),
    ],
)
def test_ranks_of_several_hosts_equal_transformers(
    name: str, layout: str, checkpoints: dict[str, Any]
) -> None:
    path, expected, answer = checkpoint_of(name, checkpoints)
    found = run_ranks(layout, compute, str(path), config=TCP)
    assert all(rank["answer"] == answer for rank in found)
    assert_logits_near(found, expected)


def compute_each_in_turns(
    group: RankGroup, paths: Sequence[str], dtype: str
) -> list[dict[str, Any]]:
    """With steps of a few tokens cut in parts that take turns."""
    overlap.MIN_PART_TOKENS = 6  # of this process alone
    assert group.axes.tp.collectives is not None
    group.axes.tp.collectives.is_in_background = True  # as between hosts
    return [compute(group, path, dtype) for path in paths]


TURNS = {
    "tp=2": ("llama-uneven", "gemma3", "olmo2", "granite", "qwen2-moe", "deepseek-v3"),
    "tp=3": ("llama-uneven",),
    "tp=2,pp=2": ("llama", "mistral-window"),
    "tp=2,ep=2": ("mixtral",),
}


@pytest.mark.parametrize("layout", TURNS)
def test_sums_that_travel_while_other_tokens_are_computed_equal_transformers(
    layout: str, checkpoints: dict[str, Any]
) -> None:
    cases = [checkpoint_of(name, checkpoints) for name in TURNS[layout]]
    paths = [str(path) for path, _, _ in cases]
    found = run_ranks(layout, compute_each_in_turns, paths, "float32", config=TCP)
    for index, (name, (_, expected, answer)) in enumerate(zip(TURNS[layout], cases, strict=True)):
        ranks = [rank[index] for rank in found]
        assert all(rank["answer"] == answer for rank in ranks), name
        assert all(rank["max_num_parts"] == 2 for rank in ranks), name
        assert_logits_near(ranks, expected, name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_hosts_nor_turns_change_a_bit(dtype: str, checkpoints: dict[str, Any]) -> None:
    """Two ranks add up in rank order however the summands travel, whatever goes on meanwhile."""
    path, _, _ = checkpoint_of("llama-uneven", checkpoints)
    by_memory = run_ranks("tp=2", compute, str(path), dtype)
    in_turns = run_ranks("tp=2", compute_each_in_turns, [str(path)], dtype, config=TCP)
    assert by_memory[0]["max_num_parts"] == 1
    assert in_turns[0][0]["max_num_parts"] == 2
    assert torch.equal(in_turns[0][0]["logits"], by_memory[0]["logits"])
    assert in_turns[0][0]["answer"] == by_memory[0]["answer"]


RINGS = {
    "sp=2": ("llama-uneven", "mistral-window", "gemma2", "gpt-oss", "deepseek-v2"),
    "sp=3": ("llama", "gemma3"),
    "sp=4": ("llama",),
    "tp=2,sp=2,pp=2": ("llama",),
    "tp=2,sp=3": ("llama-uneven", "deepseek-v3"),
}
"""Families by what a ring must give in parts: windows, caps, sinks, latent vectors; products."""
TCP_RINGS = {"sp=2", "sp=4"}


def compute_each_round(group: RankGroup, paths: Sequence[str]) -> list[dict[str, Any]]:
    """As between hosts: chosen by size, with limits that these prompts reach; else by order."""
    if group.transports[Axis.SP] == "shm":
        group.axes = replace(group.axes, kv_exchange=KvExchange.RING)
    kv_exchange.RING_MIN_CONTEXT_TOKENS = kv_exchange.RING_MIN_PART_BYTES = 0
    collectives: Any = group.axes.sp.collectives
    num_shifts, begin_shift = 0, collectives.begin_shift

    def counted(*arguments: Any) -> Any:
        nonlocal num_shifts
        num_shifts += 1
        return begin_shift(*arguments)

    collectives.begin_shift = counted
    found = compute_each(group, paths)
    assert num_shifts > 0, "nothing went round"
    return found


@pytest.mark.parametrize("layout", RINGS)
def test_keys_round_a_ring_equal_transformers(layout: str, checkpoints: dict[str, Any]) -> None:
    names = RINGS[layout]
    cases = [checkpoint_of(name, checkpoints) for name in names]
    config = TCP if layout in TCP_RINGS else None
    paths = [str(path) for path, _, _ in cases]
    found = run_ranks(layout, compute_each_round, paths, config=config)
    for index, (name, (_, expected, answer)) in enumerate(zip(names, cases, strict=True)):
        ranks = [rank[index] for rank in found]
        assert all(rank["answer"] == answer for rank in ranks), name
        assert_logits_near(ranks, expected, name)


def assert_logits_near(found: list[dict[str, Any]], expected: torch.Tensor, name: str = "") -> None:
    """The same bits on every rank that has them."""
    logits = [rank["logits"] for rank in found if rank["logits"] is not None]
    assert all(torch.equal(other, logits[0]) for other in logits), f"{name}: ranks differ"
    error = (logits[0] - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < RELATIVE_TOLERANCE, f"{name}: row {error.argmax()}: {error.max():.2e}"


DEMO_PATH = default_cache_dir(os.environ) / DEMO_FILE_NAME


@pytest.fixture(scope="module")
def demo_alone() -> dict[str, Any]:
    """What one rank computes of the demo model: 9 query heads, 3 KV heads, 30 layers."""
    (alone,) = run_ranks(1, compute, str(DEMO_PATH))
    found: dict[str, Any] = alone
    return found


@pytest.mark.skipif(not DEMO_PATH.is_file(), reason="the demo model is not in the cache")
@pytest.mark.parametrize("layout", ["tp=2", "tp=3", "tp=4", "tp=7", "tp=9", "pp=2", "tp=2,pp=2"])
def test_demo_model_split_equals_one_rank(layout: str, demo_alone: dict[str, Any]) -> None:
    found = run_ranks(layout, compute, str(DEMO_PATH))
    assert all(rank["answer"] == demo_alone["answer"] for rank in found)
    assert_logits_near(found, demo_alone["logits"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["pp=2", "pp=3", "pp=2,interleave=2"])
def test_stages_change_no_bit(layout: str, dtype: str, checkpoints: dict[str, Any]) -> None:
    """The residual that travels is the one that the next norm would have added up."""
    path, _, _ = checkpoint_of("llama", checkpoints)
    (alone,) = run_ranks(1, compute, str(path), dtype)
    found = run_ranks(layout, compute, str(path), dtype)
    assert torch.equal(found[-1]["logits"], alone["logits"])
    assert found[-1]["answer"] == alone["answer"]


def ends_of_a_step(group: RankGroup, path: str) -> list[float]:
    """When this rank had its KV of a step that is too short to split, and when it was done.

    Rank 1 is slow.
    """
    steps = Steps(group, path, "float32")
    steps.last_logits((0, 0, PROMPT))
    forward = steps.runner.model.forward
    forward_end_s = 0.0

    def slow_forward(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal forward_end_s
        if group.rank == 1:
            time.sleep(0.1)
        hidden_TD = forward(*arguments, **options)
        forward_end_s = time.monotonic()
        return hidden_TD

    steps.runner.model.forward = slow_forward  # type: ignore[method-assign]
    steps.last_logits((0, len(PROMPT), ANSWER[:1]))
    end_s = time.monotonic()
    steps.close()
    return [forward_end_s, end_s]


def test_a_step_is_over_when_all_sequence_ranks_have_its_kv(checkpoints: dict[str, Any]) -> None:
    """Each of them may be asked to hand it over."""
    path, _, _ = checkpoint_of("llama", checkpoints)
    (_, first_end_s), (second_forward_end_s, _) = run_ranks("sp=2", ends_of_a_step, str(path))
    assert second_forward_end_s <= first_end_s
