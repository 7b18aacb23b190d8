"""Random checkpoints for what the demo model cannot show: stages that cost alike, and experts."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

VOCAB_SIZE = 2048
NUM_EXPERTS = 8
_STEADY = 4.0
"""Value of the channel by which a skewed router tells popular experts."""


def write_dense(path: Path, *, num_layers: int) -> Path:
    """A model as wide as the demo model, whose LM head is too small to count as a layer."""
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": num_layers}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    config: dict[str, Any] = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        **shape,
        **heads,
    }
    weights = _dense_weights(config)
    for layer in range(config["num_hidden_layers"]):
        weights |= _mlp_weights(f"model.layers.{layer}.mlp", ("gate", "up", "down"), config)
    return _write(path, config, weights)


def write_experts(path: Path, *, skew: float) -> Path:
    """A mixture of experts in which expert e has a head start of `skew` / (e + 1) in its score.

    0 is even. Channel 0 of the residual is the same for all tokens, and read by routers only.
    """
    shape = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    experts = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
    names = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}
    config: dict[str, Any] = {**names, **shape, **heads, **experts}
    weights = _dense_weights(config)
    head_start = skew / torch.arange(1, NUM_EXPERTS + 1)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}.block_sparse_moe"
        gate = _random(NUM_EXPERTS, config["hidden_size"])
        gate[:, 0] = head_start / _STEADY
        weights[f"{block}.gate.weight"] = gate
        for expert in range(NUM_EXPERTS):
            weights |= _mlp_weights(f"{block}.experts.{expert}", ("w1", "w3", "w2"), config)
        for name, x in weights.items():
            if name.endswith(("o_proj.weight", "w2.weight")):
                x[0] = 0
    weights["model.embed_tokens.weight"][:, 0] = _STEADY
    return _write(path, config, weights)


def _dense_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Everything but the feed-forward blocks."""
    torch.manual_seed(0)
    hidden, num_layers = config["hidden_size"], config["num_hidden_layers"]
    head_dim = config["head_dim"]
    q_size = config["num_attention_heads"] * head_dim
    kv_size = config["num_key_value_heads"] * head_dim
    weights = {
        "model.embed_tokens.weight": torch.randn(VOCAB_SIZE, hidden),
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": _random(VOCAB_SIZE, hidden),
    }
    for index in range(num_layers):
        layer = f"model.layers.{index}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}.{name}.weight"] = torch.ones(hidden)
        for name, shape in {
            "q_proj": (q_size, hidden),
            "k_proj": (kv_size, hidden),
            "v_proj": (kv_size, hidden),
            "o_proj": (hidden, q_size),
        }.items():
            weights[f"{layer}.self_attn.{name}.weight"] = _random(*shape)
    return weights


def _mlp_weights(
    name: str, parts: tuple[str, str, str], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    hidden, features = config["hidden_size"], config["intermediate_size"]
    suffix = "_proj" if name.endswith(".mlp") else ""
    shapes = ((features, hidden), (features, hidden), (hidden, features))
    return {
        f"{name}.{part}{suffix}.weight": _random(*shape)
        for part, shape in zip(parts, shapes, strict=True)
    }


def _random(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns).mul_(columns**-0.5)


def _write(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    path.mkdir(parents=True)
    common = {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 65536,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    (path / "config.json").write_text(json.dumps({**common, **config}))
    save_file(
        {name: x.bfloat16() for name, x in weights.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path
