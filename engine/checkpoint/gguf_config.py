"""ModelConfig from the metadata of a GGUF file.

A family's own functions read a config.json; the metadata is told to them in its words.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import gguf

from engine.checkpoint.config import MAX_LAYERS, ModelConfig, RopeConfig, scaled_context_tokens
from engine.checkpoint.fields import Fields
from engine.checkpoint.gguf_file import GgufFile, MetadataValue
from engine.errors import CheckpointError
from engine.models.family import Family
from engine.models.registry import FAMILY_OF_ARCHITECTURE

_FAMILY_OF_NAME = {
    family.gguf: family for family in FAMILY_OF_ARCHITECTURE.values() if family.gguf is not None
}
_HUGGING_FACE_FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_LAYERS_OF_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
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
    if not isinstance(name, str) or name not in _FAMILY_OF_NAME:
        raise CheckpointError(
            f"{file.path}: the architecture {name!r} is not supported; "
            f"supported are {', '.join(sorted(_FAMILY_OF_NAME))}"
        )
    fields = Fields(f"{file.path}: {name}", _without_prefix(file.metadata, f"{name}."))
    if Fields(str(file.path), file.metadata).integer("split.count", 1) > 1:
        raise CheckpointError(
            f"{file.path} is one part of a split model; join them with llama-gguf-split --merge"
        )
    if fields.integer("expert_count", 0) and not name.endswith("moe"):
        raise CheckpointError(
            f"{file.path}: mixtures of experts are read from GGUF for qwen2moe and qwen3moe only; "
            "use the Hugging Face directory"
        )
    tokenizer = Fields(str(file.path), _without_prefix(file.metadata, "tokenizer.ggml."))
    hidden_size = fields.size("embedding_length")
    num_heads = fields.size("attention.head_count")
    num_layers = fields.size("block_count", limit=MAX_LAYERS)
    head_dim = fields.size("attention.key_length", hidden_size // num_heads)
    if fields.integer("attention.value_length", head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: keys and values of different sizes are not supported")
    max_context_tokens = fields.size("context_length")
    family = _family(name, fields)
    rope = _rope(file, fields, max_context_tokens)
    num_rotated = fields.integer("rope.dimension_count", head_dim)
    if num_rotated != head_dim:
        if not family.has_partial_rotary:
            raise CheckpointError(f"{file.path}: partly rotated heads are not supported")
        rope = replace(rope, rotated_share=num_rotated / head_dim)
    if not family.is_context_scaled:
        max_context_tokens = scaled_context_tokens(rope, max_context_tokens)
    hugging_face = _hugging_face_fields(file, name, fields, family, head_dim=head_dim)
    local_theta = hugging_face.optional_number("rope_local_base_freq")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{file.path} has no tensor token_embd.weight")
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=embedding.shape[0],
        hidden_size=hidden_size,
        intermediate_size=fields.size("feed_forward_length", hidden_size),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.size("attention.head_count_kv", num_heads),
        head_dim=head_dim,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=fields.number("attention.layer_norm_rms_epsilon", 1e-6),
        rope=rope,
        local_rope=None if local_theta is None else RopeConfig(theta=local_theta),
        windows=family.windows(hugging_face, num_layers),
        form=family.form(hugging_face),
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


def _family(name: str, fields: Fields) -> Family:
    """llama.cpp's converter writes Mistral as "llama": it differs in nothing but a window."""
    if name == "llama" and fields.integer("attention.sliding_window", 0):
        return FAMILY_OF_ARCHITECTURE["MistralForCausalLM"]
    return _FAMILY_OF_NAME[name]


def _hugging_face_fields(
    file: GgufFile, name: str, fields: Fields, family: Family, *, head_dim: int
) -> Fields:
    """The metadata as a config.json would say it, for the functions of the family."""
    values: dict[str, object] = {
        ours: fields.values[theirs]
        for theirs, ours in _HUGGING_FACE_FIELDS.items()
        if theirs in fields.values
    }
    window = fields.integer("attention.sliding_window", 0) or None
    values |= {
        "sliding_window": window,
        "use_sliding_window": window is not None,
        "max_window_layers": 0,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
    }
    if name in _LAYERS_OF_GEMMA_27B:  # llama.cpp knows the scale by the number of layers
        is_27b = fields.size("block_count") == _LAYERS_OF_GEMMA_27B[name]
        width = fields.size("embedding_length") // fields.size("attention.head_count")
        values["query_pre_attn_scalar"] = width if is_27b else head_dim
    defaults = {**family.defaults, **family.gguf_defaults}
    return Fields(str(file.path), values).with_defaults(defaults)


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
