"""ModelConfig from a Hugging Face directory: config.json and generation_config.json.

Defaults are those of transformers' configuration classes, because files leave them out.
"""

from pathlib import Path

from engine.checkpoint.config import (
    MAX_LAYERS,
    SUPPORTED_ARCHITECTURES,
    ModelConfig,
    RopeConfig,
    scaled_context_tokens,
)
from engine.checkpoint.fields import Fields, read_json
from engine.errors import CheckpointError

_DTYPES = {"float32", "bfloat16", "float16"}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SCALINGS = {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
_SCALING_ALIASES = {"su": "longrope"}
_MAX_HEADER_BYTES = 100 << 20
_DEFAULT_CONTEXT_TOKENS = {
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 4096 * 32,
    "Qwen2ForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
}


def config_from_directory(path: Path) -> ModelConfig:
    """Read `path`/config.json.

    Raises:
        CheckpointError: see `read_config`.
    """
    fields = read_json(path / "config.json")
    architecture = _architecture(fields)
    _refuse_unsupported(fields)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_layers = fields.size("num_hidden_layers", limit=MAX_LAYERS)
    max_context_tokens = fields.size(
        "max_position_embeddings", _DEFAULT_CONTEXT_TOKENS[architecture]
    )
    attention_bias = fields.flag("attention_bias", default=False)
    is_llama, is_qwen2 = architecture == "LlamaForCausalLM", architecture == "Qwen2ForCausalLM"
    may_have_bias = is_llama or architecture == "Qwen3ForCausalLM"
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden_size // num_heads
    default_kv_heads = {"MistralForCausalLM": 8}.get(architecture, num_heads)
    rope = _rope(fields, max_context_tokens)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", default_kv_heads),
        head_dim=fields.size("head_dim", default_head_dim),
        max_context_tokens=scaled_context_tokens(rope, max_context_tokens),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=_windows(fields, architecture, num_layers),
        qkv_bias=is_qwen2 or (may_have_bias and attention_bias),
        output_bias=may_have_bias and attention_bias,
        mlp_bias=is_llama and fields.flag("mlp_bias", default=False),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_eos_token_ids(path, fields),
        dtype=_dtype(path, fields),
    )


def _architecture(fields: Fields) -> str:
    named = fields.values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        if name in SUPPORTED_ARCHITECTURES:
            return name
    raise CheckpointError(
        f"{fields.source}: architectures {names} are not supported; "
        f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unsupported(fields: Fields) -> None:
    activation = fields.values.get("hidden_act", "silu")
    if activation != "silu":
        raise CheckpointError(f"{fields.source}: hidden_act {activation!r} is not supported (silu)")
    quantization = fields.values.get("quantization_config")
    if isinstance(quantization, dict):
        raise CheckpointError(
            f"{fields.source}: the weights are quantised ({quantization.get('quant_method')!r}); "
            "use the unquantised checkpoint or a GGUF file"
        )


def _rope(fields: Fields, max_context_tokens: int) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before)."""
    raw = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(raw, dict) or any(isinstance(value, dict) for value in raw.values()):
        raise CheckpointError(f"{fields.source}: rope_parameters must be one flat object")
    rope = Fields(f"{fields.source}: rope_parameters", raw)
    scaling = raw.get("rope_type", raw.get("type", "default"))
    scaling = _SCALING_ALIASES.get(scaling, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(scaling, str) or scaling not in _SCALINGS:
        raise CheckpointError(
            f"{rope.source}: type {scaling!r} is not supported; use one of {sorted(_SCALINGS)}"
        )
    share = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if share != 1.0 and scaling != "proportional":
        raise CheckpointError(f"{rope.source}: partial_rotary_factor {share} is not supported")
    original = rope.optional_integer("original_max_position_embeddings")
    if scaling in {"llama3", "yarn", "longrope"}:
        outer = fields.optional_integer("original_max_position_embeddings")
        original = outer or original or max_context_tokens
    elif scaling == "dynamic":
        original = max_context_tokens
    factor = rope.optional_number("factor")
    if scaling in {"linear", "dynamic", "llama3"} and factor is None:
        raise CheckpointError(f"{rope.source}: {scaling} needs a factor")
    if scaling in {"yarn", "longrope"} and factor is None and original is not None:
        factor = max_context_tokens / original
    return RopeConfig(
        theta=rope.number("rope_theta", fields.number("rope_theta", 10000.0)),
        scaling=scaling,
        factor=factor,
        original_max_context_tokens=original,
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.optional_number("beta_fast"),
        beta_slow=rope.optional_number("beta_slow"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
        low_freq_factor=rope.optional_number("low_freq_factor"),
        high_freq_factor=rope.optional_number("high_freq_factor"),
        short_factor=rope.numbers("short_factor"),
        long_factor=rope.numbers("long_factor"),
        rotated_share=share,
    )


def _windows(fields: Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if architecture == "LlamaForCausalLM":
        return everywhere
    if architecture == "MistralForCausalLM":
        named = "sliding_window" in fields.values
        window = fields.optional_integer("sliding_window") if named else 4096
        return (window,) * num_layers
    if not fields.flag("use_sliding_window", default=False):
        return everywhere
    window = fields.size("sliding_window", 4096)
    layer_types = fields.values.get("layer_types")
    if layer_types is None:
        first = fields.integer("max_window_layers", 28)
        return tuple(window if index >= first else None for index in range(num_layers))
    known: dict[object, int | None] = {"sliding_attention": window, "full_attention": None}
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or not known.keys() >= set(layer_types)
    ):
        raise CheckpointError(f"{fields.source}: layer_types must name {num_layers} layers")
    return tuple(known[name] for name in layer_types)


def _eos_token_ids(path: Path, fields: Fields) -> frozenset[int]:
    """generation_config.json wins where it names any, as in `generate` of transformers."""
    if (path / "generation_config.json").is_file():
        ids = read_json(path / "generation_config.json").token_ids("eos_token_id")
        if ids:
            return ids
    return fields.token_ids("eos_token_id")


def _dtype(path: Path, fields: Fields) -> str:
    named = fields.values.get("dtype") or fields.values.get("torch_dtype")
    if isinstance(named, str) and named.removeprefix("torch.") in _DTYPES:
        return named.removeprefix("torch.")
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            num_bytes = int.from_bytes(stream.read(8), "little")
            header = stream.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
        for code, dtype in _SAFETENSORS_DTYPES.items():
            if f'"dtype":"{code}"'.encode() in header:
                return dtype
    return "float32"
