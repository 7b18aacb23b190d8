"""ModelConfig from the metadata of a GGUF file.

llama.cpp's converter writes Llama and Mistral both as "llama": they differ in nothing but a window.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import gguf

from engine.checkpoint.config import MAX_LAYERS, ModelConfig, RopeConfig, scaled_context_tokens
from engine.checkpoint.fields import Fields
from engine.checkpoint.gguf_file import GgufFile, MetadataValue
from engine.errors import CheckpointError

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_END_TOKENS = ("eos_token_id", "eot_token_id", "eom_token_id")
_FLOAT_DTYPES = {
    gguf.GGMLQuantizationType.F32: "float32",
    gguf.GGMLQuantizationType.F16: "float16",
    gguf.GGMLQuantizationType.BF16: "bfloat16",
}


def config_from_gguf(path: Path) -> ModelConfig:
    """Read the header of a .gguf file.

    Raises:
        CheckpointError: see `read_config`.
    """
    return config_from_gguf_file(GgufFile(path))


def config_from_gguf_file(file: GgufFile) -> ModelConfig:
    """The same for a file that is open already."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: the architecture {name!r} is not supported; "
            f"supported are {', '.join(sorted(ARCHITECTURES))}"
        )
    fields = Fields(f"{file.path}: {name}", _without_prefix(file.metadata, f"{name}."))
    if Fields(str(file.path), file.metadata).integer("split.count", 1) > 1:
        raise CheckpointError(
            f"{file.path} is one part of a split model; join them with llama-gguf-split --merge"
        )
    if fields.integer("expert_count", 0):
        raise CheckpointError(f"{file.path}: mixtures of experts are not supported")
    tokenizer = Fields(str(file.path), _without_prefix(file.metadata, "tokenizer.ggml."))
    hidden_size = fields.size("embedding_length")
    num_heads = fields.size("attention.head_count")
    num_layers = fields.size("block_count", limit=MAX_LAYERS)
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    if fields.integer("rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: partly rotated heads are not supported")
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: keys and values of different sizes are not supported")
    max_context_tokens = fields.size("context_length")
    rope = _rope(file, fields, max_context_tokens)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight")
    return ModelConfig(
        architecture=ARCHITECTURES[name],
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.size("feed_forward_length"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_context_tokens=scaled_context_tokens(rope, max_context_tokens),
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=rope,
        windows=(fields.optional_integer("attention.sliding_window") or None,) * num_layers,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        tie_word_embeddings="output.weight" not in file.tensors,
        bos_token_id=tokenizer.optional_integer("bos_token_id"),
        eos_token_ids=frozenset(
            token_id
            for key in _END_TOKENS
            for token_id in tokenizer.token_ids(key)
            if token_id < embedding.shape[0]  # converters write 2^32 - 1 for "none"
        ),
        dtype=_dtype(file),
    )


def _without_prefix(metadata: Mapping[str, MetadataValue], prefix: str) -> dict[str, MetadataValue]:
    return {
        key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)
    }


def _rope(file: GgufFile, fields: Fields, max_context_tokens: int) -> RopeConfig:
    """Scalings as llama.cpp knows them; Llama 3's is a tensor of divisors, one a frequency."""
    theta = fields.number("rope.freq_base", 10000.0)
    scaling = fields.values.get("rope.scaling.type", "none")
    factor = fields.optional_number("rope.scaling.factor")
    original = fields.integer("rope.scaling.original_context_length", max_context_tokens)
    attention_factor = fields.optional_number("rope.scaling.attn_factor")
    if "rope_factors_long.weight" in file.tensors:
        return RopeConfig(
            theta=theta,
            scaling="longrope",
            factor=factor or max_context_tokens / original,
            original_max_context_tokens=original,
            attention_factor=attention_factor,
            short_factor=_factors(file, "rope_factors_short.weight"),
            long_factor=_factors(file, "rope_factors_long.weight"),
        )
    if "rope_freqs.weight" in file.tensors:
        factors = _factors(file, "rope_freqs.weight")
        return RopeConfig(theta=theta, scaling="factors", short_factor=factors)
    if scaling == "none" or (scaling == "linear" and factor is None):
        return RopeConfig(theta=theta)
    if scaling == "linear":
        return RopeConfig(theta=theta, scaling="linear", factor=factor)
    if scaling == "yarn":
        factor = factor or max_context_tokens / original
        if attention_factor is not None:  # llama.cpp multiplies it on top of the usual one
            attention_factor *= 0.1 * math.log(factor) + 1.0
        return RopeConfig(
            theta=theta,
            scaling="yarn",
            factor=factor,
            original_max_context_tokens=original,
            attention_factor=attention_factor,
            beta_fast=fields.optional_number("rope.scaling.yarn_beta_fast"),
            beta_slow=fields.optional_number("rope.scaling.yarn_beta_slow"),
        )
    raise CheckpointError(f"{fields.source}.rope.scaling.type {scaling!r} is not supported")


def _factors(file: GgufFile, name: str) -> tuple[float, ...]:
    if name not in file.tensors:
        raise CheckpointError(f"{file.path} has no tensor {name}")
    return tuple(file.read(name).ravel().tolist())


def _dtype(file: GgufFile) -> str:
    """The dtype of most elements; bfloat16 where they are quantised."""
    num_bytes: dict[gguf.GGMLQuantizationType, int] = {}
    for tensor in file.tensors.values():
        num_bytes[tensor.quantization] = num_bytes.get(tensor.quantization, 0) + tensor.num_bytes
    most = max(num_bytes, key=lambda kind: num_bytes[kind])
    return _FLOAT_DTYPES.get(most, "bfloat16")
