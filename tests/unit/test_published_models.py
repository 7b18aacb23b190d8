"""Configurations in the words of published checkpoints, older than transformers 5.

The sizes are those of the model cards: a wrong default or a layer too many shows in them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint import read_config
from engine.kernels.torch_kernels import TorchKernels
from engine.models.build import build
from engine.parallel.axes import ParallelAxes

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Published:
    """Some fields of a config.json, and what must follow from them."""

    architecture: str
    fields: dict[str, Any]
    billions: float
    context: int
    windows: tuple[int | None, ...]
    """Of the first layers."""
    rotary_dim: int


MODELS = {
    "gpt-oss-20b": Published("GptOssForCausalLM", {
        "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880,
        "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8,
        "head_dim": 64, "num_local_experts": 32, "experts_per_token": 4, "rope_theta": 150000,
        "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "truncate": False,
                         "original_max_position_embeddings": 4096, "rope_type": "yarn"},
        "quantization_config": {"quant_method": "mxfp4"}, "swiglu_limit": 7.0,
        "max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True,
    }, 20.915, 131072, (128, None, 128, None), 64),
    "gemma-3-1b": Published("Gemma3ForCausalLM", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
        "max_position_embeddings": 32768, "rope_local_base_freq": 10000, "rope_theta": 1000000,
        "rope_scaling": None, "sliding_window": 512, "sliding_window_pattern": 6,
        "final_logit_softcapping": None,
    }, 1.0, 32768, (512, 512, 512, 512, 512, None, 512), 256),
    "gemma-2-2b": Published("Gemma2ForCausalLM", {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "hidden_act": "gelu_pytorch_tanh",
    }, 2.614, 8192, (4096, None, 4096, None), 256),
    "phi-4-mini": Published("Phi3ForCausalLM", {
        "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75, "sliding_window": 262144, "tie_word_embeddings": True,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48,
                         "long_factor": [1.5] * 48},
    }, 3.836, 131072, (262144,), 96),
    "phi-3-mini": Published("Phi3ForCausalLM", {
        "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
        "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": 2047,
        "rope_scaling": None,
    }, 3.821, 4096, (2047,), 96),
    "olmo-2-7b": Published("Olmo2ForCausalLM", {
        "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
    }, 7.299, 4096, (None,), 128),
    "granite-3.1-2b": Published("GraniteForCausalLM", {
        "vocab_size": 49155, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 131072, "tie_word_embeddings": True, "logits_scaling": 8.0,
    }, 2.534, 131072, (None,), 64),
    "mixtral-8x7b": Published("MixtralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "sliding_window": None,
        "max_position_embeddings": 32768,
    }, 46.703, 32768, (None,), 128),
    "qwen1.5-moe-a2.7b": Published("Qwen2MoeForCausalLM", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 24, "num_attention_heads": 16, "use_sliding_window": False,
        "max_position_embeddings": 8192, "max_window_layers": 21,
    }, 14.316, 8192, (None,), 128),
    "qwen3-30b-a3b": Published("Qwen3MoeForCausalLM", {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 48, "num_attention_heads": 32, "head_dim": 128,
        "norm_topk_prob": True, "mlp_only_layers": [], "max_position_embeddings": 40960,
    }, 30.532, 40960, (None,), 128),
    "deepseek-v2-lite": Published("DeepseekV2ForCausalLM", {
        "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "num_hidden_layers": 27, "num_attention_heads": 16, "q_lora_rank": None,
        "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": False,
        "scoring_func": "softmax", "moe_layer_freq": 1, "max_position_embeddings": 163840,
        "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707,
                         "mscale_all_dim": 0.707, "original_max_position_embeddings": 4096,
                         "type": "yarn"},
    }, 15.706, 163840, (None,), 64),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sizes_are_those_of_the_model_card(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    fields = {"architectures": [model.architecture], **model.fields}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config = read_config(tmp_path)
    assert config.max_context_tokens == model.context
    assert config.windows[: len(model.windows)] == model.windows
    assert config.rotary_dim == model.rotary_dim
    built = build(
        config,
        axes=ParallelAxes.single(),
        kernels=TorchKernels(CPU),
        dtype=torch.bfloat16,
        device=CPU,
    )
    num_parameters = sum(parameter.numel() for parameter in built.parameters())
    assert round(num_parameters / 1e9, 3) == model.billions
