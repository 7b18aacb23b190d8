"""Each family, rope scaling and option against transformers, in float32, on random checkpoints."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.config import ModelConfig
from engine.kernels import Kernels, choose_kernels
from engine.kernels.torch_kernels import TorchKernels
from engine.kv_cache.batch import StepBatch
from engine.models.build import load_model
from engine.models.causal_lm import CausalLM
from engine.models.registry import FAMILY_OF_ARCHITECTURE
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint

BLOCK_SIZE = 16
NUM_BLOCKS = 64
RELATIVE_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One checkpoint to compare."""

    family: str
    overrides: dict[str, Any] = field(default_factory=dict)
    max_shard_size: str = "1GB"


def rope(scaling: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": scaling, "rope_theta": 10000.0, **parameters}}


_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {
    "short_factor": [1.0 + 0.1 * index for index in range(8)],
    "long_factor": [2.0 + 0.5 * index for index in range(8)],
}
EXPERTS: dict[str, Any] = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
LATENT: dict[str, Any] = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "head_dim": 8,
    "num_key_value_heads": 4,
}
SINKS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 24,
}
CASES = {
    "llama": Case("llama"),
    "llama-tied": Case("llama", {"tie_word_embeddings": True}),
    "llama-sharded": Case("llama", max_shard_size="60KB"),
    "llama-attention-bias": Case("llama", {"attention_bias": True}),
    "llama-mlp-bias": Case("llama", {"mlp_bias": True}),
    "llama-no-groups": Case("llama", {"num_key_value_heads": 4}),
    "llama-9-heads-3-kv": Case("llama", {"num_attention_heads": 9, "num_key_value_heads": 3,
                                         "hidden_size": 72, "head_dim": 8}),
    "llama-wide-heads": Case("llama", {"head_dim": 32}),
    "llama-theta": Case("llama", rope("default", rope_theta=500000.0)),
    "llama-linear": Case("llama", rope("linear", factor=4.0)),
    "llama-dynamic": Case("llama", rope("dynamic", factor=4.0)),
    "llama-dynamic-past-its-context": Case(
        "llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 48}
    ),
    "llama-yarn": Case(
        "llama", rope("yarn", factor=4.0, original_max_position_embeddings=128)
    ),
    "llama-yarn-all-fields": Case(
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=128, beta_fast=16.0,
             beta_slow=2.0, mscale=0.7, mscale_all_dim=0.9, truncate=False),
    ),
    "llama-yarn-attention-factor": Case(
        "llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=128, attention_factor=1.3),
    ),
    "llama-longrope-short": Case(
        "llama", rope("longrope", factor=4.0, original_max_position_embeddings=128, **_LONG)
    ),
    "llama-longrope-long": Case(
        "llama", rope("longrope", factor=8.0, original_max_position_embeddings=64, **_LONG)
    ),
    "llama-longrope-crossed-while-decoding": Case(
        "llama", rope("longrope", factor=8.0, original_max_position_embeddings=102, **_LONG)
    ),
    "llama-llama3": Case(
        "llama", rope("llama3", factor=8.0, original_max_position_embeddings=64, **_LLAMA3)
    ),
    "llama-proportional": Case("llama", rope("proportional", partial_rotary_factor=0.5)),
    "qwen2": Case("qwen2"),
    "qwen2-tied": Case("qwen2", {"tie_word_embeddings": True}),
    "qwen2-window-ignored": Case("qwen2", {"use_sliding_window": False, "sliding_window": 8}),
    "qwen2-window-upper-layers": Case(
        "qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}
    ),
    "qwen2-yarn": Case("qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=128)),
    "qwen3": Case("qwen3"),
    "qwen3-bias-tied": Case("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "qwen3-window": Case(
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
    ),
    "mistral": Case("mistral"),
    "mistral-window": Case("mistral", {"sliding_window": 24}),
    "mistral-window-of-one-block": Case("mistral", {"sliding_window": 16}),
    "mistral-no-window": Case("mistral", {"sliding_window": None}),
    "gemma2": Case("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 24,
                              "tie_word_embeddings": True}),
    "gemma2-low-caps": Case("gemma2", {"attn_logit_softcapping": 2.0,
                                       "final_logit_softcapping": 3.0, "attention_bias": True}),
    "gemma2-no-caps": Case("gemma2", {"attn_logit_softcapping": None, "sliding_window": 24,
                                      "final_logit_softcapping": None}),
    "gemma3": Case("gemma3_text", {"sliding_window": 24, "num_hidden_layers": 7,
                                   "query_pre_attn_scalar": 24, "tie_word_embeddings": True}),
    "gemma3-linear-full-layers": Case("gemma3_text", {
        "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4, "final_logit_softcapping": 3.0, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}}),
    "phi3": Case("phi3"),
    "phi3-window": Case("phi3", {"sliding_window": 24}),
    "phi3-longrope-part-rotated": Case("phi3", {
        "original_max_position_embeddings": 64, "head_dim": 16, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
            "short_factor": [1.0 + 0.1 * index for index in range(6)],
            "long_factor": [2.0 + 0.5 * index for index in range(6)]}}),
    "olmo2": Case("olmo2"),
    "olmo2-bias-no-groups": Case("olmo2", {"attention_bias": True, "num_key_value_heads": 4}),
    "granite": Case("granite", {"attention_multiplier": 0.3, "embedding_multiplier": 6.0,
                                "residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "granite-bias-tied": Case("granite", {"attention_bias": True, "mlp_bias": True,
                                          "tie_word_embeddings": True}),
    "mixtral": Case("mixtral", EXPERTS),
    "mixtral-window": Case("mixtral", {**EXPERTS, "sliding_window": 24}),
    "qwen2-moe": Case("qwen2_moe", {**EXPERTS, "mlp_only_layers": [1]}),
    "qwen2-moe-normalised": Case("qwen2_moe", {**EXPERTS, "norm_topk_prob": True,
                                               "decoder_sparse_step": 2}),
    "qwen2-moe-window": Case("qwen2_moe", {**EXPERTS, "use_sliding_window": True,
                                           "sliding_window": 24, "max_window_layers": 2}),
    "qwen3-moe": Case("qwen3_moe", EXPERTS),
    "qwen3-moe-normalised": Case("qwen3_moe", {**EXPERTS, "norm_topk_prob": True,
                                               "attention_bias": True}),
    "deepseek-v2": Case("deepseek_v2", LATENT),
    "deepseek-v2-groups": Case("deepseek_v2", {
        **LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 1.7, "attention_bias": True, "mlp_bias": True}),
    "deepseek-v2-lite": Case("deepseek_v2", {**LATENT, "q_lora_rank": None}),
    "deepseek-v2-yarn": Case("deepseek_v2", {
        **LATENT, **rope("yarn", factor=4.0, original_max_position_embeddings=128, mscale=0.707,
                         mscale_all_dim=0.8)}),
    "deepseek-v3": Case("deepseek_v3", LATENT),
    "deepseek-v3-halves": Case("deepseek_v3", {**LATENT, "rope_interleave": False,
                                               "norm_topk_prob": False, "attention_bias": True}),
    "deepseek-v3-yarn": Case("deepseek_v3", {
        **LATENT, **rope("yarn", factor=4.0, original_max_position_embeddings=128, mscale=1.0,
                         mscale_all_dim=1.0)}),
    "gpt-oss": Case("gpt_oss", SINKS),
    "gpt-oss-yarn": Case("gpt_oss", {**SINKS, "attention_bias": False, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=128, truncate=False)}),
}  # fmt: skip


class TinyPool:
    """The layout of `engine.kv_cache` without its pool; foreign blocks hold NaN."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        shape = (
            config.num_layers,
            config.num_kv_parts,
            config.num_kv_heads,
            BLOCK_SIZE,
            config.head_dim,
        )
        self.blocks_PLJGCA = torch.full((NUM_BLOCKS, *shape), torch.nan, dtype=dtype, device=device)

    def layer(self, index: int) -> torch.Tensor:
        return self.blocks_PLJGCA[:, index]


@dataclass
class Track:
    """One sequence's tokens and blocks, and how many of its tokens are computed."""

    token_ids: list[int]
    block_ids: list[int]
    num_prompt_tokens: int
    num_computed: int = 0


class Runner:
    """Drives a model by hand: the blocks of the sequences are interleaved and out of order."""

    def __init__(self, model: CausalLM, prompts: Sequence[Sequence[int]]) -> None:
        self.model = model
        assert model.norm is not None, "of one stage"
        self.device = model.norm.weight_D.device
        self.pool = TinyPool(model.config, device=self.device)
        order = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(1)).tolist()
        self.sequences = [
            Track(list(prompt), order[index :: len(prompts)], len(prompt))
            for index, prompt in enumerate(prompts)
        ]

    def step(self, counts: Sequence[int]) -> list[torch.Tensor]:
        """Compute the next `counts[b]` tokens of each sequence; returns their logits."""
        chosen = [(s, n) for s, n in zip(self.sequences, counts, strict=True) if n]
        tokens, positions, slots = [], [], []
        for sequence, count in chosen:
            for position in range(sequence.num_computed, sequence.num_computed + count):
                tokens.append(sequence.token_ids[position])
                positions.append(position)
                block = sequence.block_ids[position // BLOCK_SIZE]
                slots.append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            sequence.num_computed += count
        with self.device:
            batch = self._batch(chosen, tokens, positions, slots)
        logits_TV = self.model.logits(self.model.forward(batch, self.pool))
        return list(logits_TV.cpu().split(batch.query_lens))

    @staticmethod
    def _batch(
        chosen: list[tuple[Track, int]],
        tokens: list[int],
        positions: list[int],
        slots: list[int],
    ) -> StepBatch:
        lens = tuple(count for _, count in chosen)
        contexts = tuple(sequence.num_computed for sequence, _ in chosen)
        width = max(-(-context // BLOCK_SIZE) for context in contexts)
        return StepBatch(
            token_T=torch.tensor(tokens),
            position_T=torch.tensor(positions),
            slot_T=torch.tensor(slots),
            block_table_BW=torch.tensor(
                [sequence.block_ids[:width] for sequence, _ in chosen], dtype=torch.int32
            ),
            query_start_B1=torch.tensor([0, *accumulate(lens)], dtype=torch.int32),
            context_len_B=torch.tensor(contexts, dtype=torch.int32),
            query_lens=lens,
            context_lens=contexts,
            prompt_lens=tuple(sequence.num_prompt_tokens for sequence, _ in chosen),
        )


def prompt_of(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()


def reference_logits(
    path: Path,
    prompt: Sequence[int],
    answer: Sequence[int],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """transformers: the prompt in one piece, then one token after the other."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        out = model(torch.tensor([list(prompt)]), use_cache=True)
        logits = [out.logits[0]]
        for token in answer:
            out = model(
                torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True
            )
            logits.append(out.logits[0])
    return torch.cat(logits)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Relative to the largest logit of the position."""
    error = (actual - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert error.max() < RELATIVE_TOLERANCE, f"position {error.argmax()}: {error.max():.2e}"
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    gc.collect()


CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "chosen"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """The reference, and what serves on this machine (native code where it was built)."""
    return TorchKernels(CPU) if request.param == "torch" else choose_kernels(CPU, torch.float32, 1)


PROMPT = prompt_of(100)
ANSWER = prompt_of(6, seed=9)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_logits_equal_those_of_transformers(case: Case, kernels: Kernels, tmp_path: Path) -> None:
    path = tiny_checkpoint(
        tmp_path, case.family, max_shard_size=case.max_shard_size, **case.overrides
    )
    expected = reference_logits(path, PROMPT, ANSWER)
    model = load_model(path, kernels=kernels)

    whole = Runner(model, [PROMPT])
    parts = whole.step([len(PROMPT)])
    whole.sequences[0].token_ids += ANSWER
    parts += [part for _ in ANSWER for part in whole.step([1])]
    assert_close(torch.cat(parts), expected)

    shared_blocks = 4
    hit = Runner(model, [PROMPT, PROMPT])
    hit.step([len(PROMPT), 0])
    first, second = hit.sequences
    second.block_ids[:shared_blocks] = first.block_ids[:shared_blocks]
    second.num_computed = shared_blocks * BLOCK_SIZE
    (rest,) = hit.step([0, len(PROMPT) - second.num_computed])
    assert_close(rest, expected[shared_blocks * BLOCK_SIZE : len(PROMPT)])

    chunked = Runner(model, [[*PROMPT, *ANSWER]])
    chunked.sequences[0].num_prompt_tokens = len(PROMPT)
    chunks = (37, 1, 16, 40, 6, *(1 for _ in ANSWER))
    assert_close(torch.cat([part for n in chunks for part in chunked.step([n])]), expected)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3",
        "mistral-window",
        "gemma2",
        "gemma3",
        "phi3-window",
        "olmo2",
        "mixtral",
        "deepseek-v3",
        "gpt-oss",
    ],
)
def test_a_ragged_batch_equals_each_sequence_alone(
    name: str, kernels: Kernels, tmp_path: Path
) -> None:
    case = CASES[name]
    path = tiny_checkpoint(tmp_path, case.family, **case.overrides)
    prompts = [prompt_of(length, seed=length) for length in (1, 15, 16, 17, 50)]
    answers = [prompt_of(4, seed=100 + length) for length in (1, 15, 16, 17, 50)]
    model = load_model(path, kernels=kernels)
    runner = Runner(model, prompts)
    got: list[list[torch.Tensor]] = [[] for _ in prompts]

    def step(*counts: int) -> None:
        chosen = [index for index, count in enumerate(counts) if count]
        for index, logits in zip(chosen, runner.step(counts), strict=True):
            got[index].append(logits)

    step(1, 15, 10, 0, 20)  # two whole prompts, two chunks, one that waits
    for sequence, answer in zip(runner.sequences, answers, strict=True):
        sequence.token_ids += answer
    step(1, 1, 6, 17, 29)  # decodes, last chunk, whole prompt and a middle chunk mixed
    step(1, 1, 1, 1, 1)
    step(1, 0, 1, 1, 1)
    step(0, 1, 1, 1, 1)
    step(1, 1, 1, 1, 2)
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = reference_logits(path, prompt, answer)
        actual = torch.cat(got[index])
        assert len(actual) == len(expected)
        assert_close(actual, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-dynamic-past-its-context",
        "llama-longrope-long",
        "qwen3",
        "mistral-window",
        "gemma2",
        "gemma3",
        "phi3-longrope-part-rotated",
        "mixtral",
        "deepseek-v3",
        "gpt-oss",
    ],
)
def test_logits_on_cuda_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    case, cuda = CASES[name], torch.device("cuda", 0)
    path = tiny_checkpoint(tmp_path, case.family, **case.overrides)
    model = load_model(path, kernels=TorchKernels(cuda), device=cuda)
    runner = Runner(model, [[*PROMPT, *ANSWER]])
    runner.sequences[0].num_prompt_tokens = len(PROMPT)
    parts = [part for n in (60, 40, *(1 for _ in ANSWER)) for part in runner.step([n])]
    assert_close(torch.cat(parts), reference_logits(path, PROMPT, ANSWER))


FAMILY_NAMES = ("llama", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite", "mixtral",
                "qwen2-moe", "deepseek-v2", "deepseek-v3", "gpt-oss")  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_half_precision_is_as_near_to_float32_as_that_of_transformers(
    name: str, dtype: str, tmp_path: Path
) -> None:
    """In the median: where rounding sends a token to another expert, errors are of that kind."""
    case = CASES[name]
    overrides = {"initializer_range": 0.05, **case.overrides}
    path = tiny_checkpoint(tmp_path, case.family, dtype=dtype, **overrides)
    exact = reference_logits(path, PROMPT, [])
    theirs = reference_logits(path, PROMPT, [], getattr(torch, dtype)).float()
    kernels = choose_kernels(CPU, getattr(torch, dtype), 1)
    model = load_model(path, kernels=kernels)
    assert model.embedding is not None
    assert model.embedding.weight_VD.dtype == getattr(torch, dtype)
    half = Runner(model, [PROMPT])
    half.pool = TinyPool(model.config, getattr(torch, dtype))
    (ours,) = half.step([len(PROMPT)])
    assert ours.dtype == torch.float32
    error, expected_error = (
        ((logits - exact).abs().amax(-1) / exact.abs().amax(-1)).median()
        for logits in (ours, theirs)
    )
    assert error < 1.2 * expected_error


def test_every_rope_scaling_of_transformers_has_a_row() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rows = {case.overrides.get("rope_parameters", {}).get("rope_type") for case in CASES.values()}
    assert set(ROPE_INIT_FUNCTIONS) <= rows


def test_every_family_has_a_row() -> None:
    """The recipe in docs/adding-a-model.md, held."""
    from transformers import AutoConfig, AutoModelForCausalLM

    rows = {case.family for case in CASES.values()}
    mapping = AutoModelForCausalLM._model_mapping
    named = {str(mapping[type(AutoConfig.for_model(row))]) for row in rows}
    assert {name.rpartition(".")[2].rstrip("'>") for name in named} == set(FAMILY_OF_ARCHITECTURE)


def test_an_untied_head_in_a_checkpoint_that_says_tied_is_used(tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, "llama")
    text = (path / "config.json").read_text()
    assert '"tie_word_embeddings": false' in text
    (path / "config.json").write_text(
        text.replace('"tie_word_embeddings": false', '"tie_word_embeddings": true')
    )
    model = load_model(path, kernels=TorchKernels(CPU))
    assert not model.config.tie_word_embeddings
    (actual,) = Runner(model, [PROMPT]).step([len(PROMPT)])
    assert_close(actual, reference_logits(path, PROMPT, []))
