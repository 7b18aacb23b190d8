"""Small random checkpoints made by transformers, with a tokenizer and chat template; seeded."""

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] "
    "+ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = 384
_TRAINING_LINES = (
    "An isthmus is a narrow strip of land that joins two larger ones.",
    "The quick brown fox jumps over the lazy dog, again and again and again.",
    "system user assistant question answer: what is the capital of France? Paris.",
    "def main():\n    return sum(number * number for number in range(10))",
    "Gruesse, naive cafe, Straße, 東京, emoji \N{GRINNING FACE} and 1234567890.",
)

_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def tiny_checkpoint(
    tmp_path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a Hugging Face directory of a few hundred kilobytes; `overrides` go to its config.

    `family` is a `model_type` of transformers. Biases and norm weights are random too, so that a
    loader that drops them is noticed. `max_shard_size="40KB"` writes several shards and an index.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    path = tmp_path / f"{family}-{seed}"
    path.mkdir(parents=True)
    config = AutoConfig.for_model(family, **{**_SMALL, **overrides})
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        buffers = {name: x for name, x in model.named_buffers() if name in model.state_dict()}
        for name, parameter in sorted({**dict(model.named_parameters()), **buffers}.items()):
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name else 0.0
            parameter.copy_(centre + config.initializer_range * noise)
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """Train a byte-level BPE tokenizer on a few lines and write it as Hugging Face does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TRAINING_LINES, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[1],
        "eos_token": SPECIAL_TOKENS[2],
        "pad_token": SPECIAL_TOKENS[0],
        "clean_up_tokenization_spaces": False,
    }
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))


_GGUF_NAMES = {
    "mistral": "llama",
    "gemma3_text": "gemma3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
}
_GGUF_KEYS = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
}


def write_gguf(directory: Path, gguf_path: Path, quantization: str = "F32") -> Path:
    """Convert a directory of `tiny_checkpoint` as llama.cpp's converter does; matrices quantised.

    `quantization` is a name of gguf.GGMLQuantizationType. The K formats have no quantiser in
    Python: their matrices get random blocks instead, so read the weights back from the file.
    """
    from safetensors.torch import load_file
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory)
    kind = gguf.GGMLQuantizationType[quantization]
    arch = _GGUF_NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(gguf_path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    for field, key in _GGUF_KEYS.items():
        if getattr(config, field, None) is not None:
            writer.add_key_value(f"{arch}.{key}", *_typed(getattr(config, field)))
    _add_longrope(writer, config)
    _add_tokenizer(writer, directory)
    arch_of_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(arch_of_name[arch], config.num_hidden_layers)
    tensors = _with_stacked_experts(load_file(directory / "model.safetensors"))
    for name, values in sorted(tensors.items()):
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert gguf_name is not None, name
        is_interleaved = arch in {"llama", "granite"} and (".q_proj." in name or ".k_proj." in name)
        has_offset = arch.startswith("gemma") and "norm" in name
        rows = _interleaved(values, config.head_dim) if is_interleaved else values + has_offset
        data = rows.float().numpy()
        if data.ndim == 1:
            writer.add_tensor(gguf_name, data)
        else:
            writer.add_tensor(gguf_name, _quantized(data, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_path


def _with_stacked_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a layer as one tensor, as in llama.cpp's files."""
    experts: dict[str, dict[int, torch.Tensor]] = {}
    stacked: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(.*)", name)
        if match is None:
            stacked[name] = tensor
        else:
            experts.setdefault(f"{match[1]}.{match[3]}", {})[int(match[2])] = tensor
    for name, parts in experts.items():
        stacked[name] = torch.stack([parts[index] for index in sorted(parts)])
    return stacked


def _typed(value: float) -> tuple[float, gguf.GGUFValueType]:
    kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.UINT32
    return value, kind


def _add_longrope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = config.rope_parameters
    if rope.get("rope_type") != "longrope":
        return
    num_rotated = int(config.head_dim * rope["partial_rotary_factor"])
    original = config.original_max_position_embeddings
    writer.add_rope_dimension_count(num_rotated)
    writer.add_rope_scaling_orig_ctx_len(original)
    growth = math.log(config.max_position_embeddings / original) / math.log(original)
    writer.add_rope_scaling_attn_factors(math.sqrt(1 + growth))
    for kind in ("short", "long"):
        factors = np.array(rope[f"{kind}_factor"], dtype=np.float32)
        writer.add_tensor(f"rope_factors_{kind}.weight", factors)


def _interleaved(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """llama.cpp's order: (i, i + A / 2) of a head stand beside each other."""
    heads = rows.unflatten(0, (-1, 2, head_dim // 2))
    interleaved: torch.Tensor = heads.transpose(1, 2).reshape(rows.shape)
    return interleaved


def _add_tokenizer(writer: gguf.GGUFWriter, directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [" ".join(pair) for pair in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL_TOKENS else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _quantized(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    if kind == gguf.GGMLQuantizationType.F32:
        return data
    if kind == gguf.GGMLQuantizationType.F16:
        return data.astype(np.float16)
    try:
        return gguf.quants.quantize(data, kind)
    except NotImplementedError:
        return _random_blocks(data.shape, kind)


def _random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Any bytes are a valid block of a K format, once its float16 scales are small and finite."""
    scales_at = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q2_K": (80, 82), "Q3_K": (108,)}
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = shape[0] * shape[1] // block_size
    random = np.random.default_rng(shape[0] * 7919 + shape[1])
    blocks = random.integers(0, 256, (num_blocks, block_bytes), np.uint8)
    for offset in scales_at[kind.name]:
        scales = random.uniform(1e-5, 1e-4, num_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


def export_hf(gguf_path: Path, out_dir: Path) -> Path:
    """Write the weights and config of a GGUF file as a float32 directory that transformers loads.

    The tokenizer is not written: `gateway` builds it from the same GGUF metadata.
    """
    from safetensors.torch import save_file

    from engine.checkpoint.gguf_file import GgufFile
    from engine.checkpoint.read import read_config
    from engine.weights.source import open_weights

    config = read_config(gguf_path)
    out_dir.mkdir(parents=True, exist_ok=True)
    with open_weights(gguf_path, config) as weights:
        tensors = {name: weights.read(name).to(torch.float32) for name in weights.names}
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        out_dir / "model.safetensors",
        metadata={"format": "pt"},
    )
    assert GgufFile(gguf_path).metadata["general.architecture"] == "llama", "others: not needed yet"
    fields = {
        "architectures": [config.architecture],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": sorted(config.eos_token_ids),
        "torch_dtype": "float32",
    }
    (out_dir / "config.json").write_text(json.dumps(fields))
    return out_dir
