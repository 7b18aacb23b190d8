"""ModelConfig from a Hugging Face directory: config.json and generation_config.json.

What files leave out has the default of transformers' configuration classes: see `engine.models`.
"""

from pathlib import Path

from engine.checkpoint.config import MAX_LAYERS, ModelConfig, scaled_context_tokens
from engine.checkpoint.fields import Fields, read_json
from engine.checkpoint.rope_fields import rope_from_fields
from engine.errors import CheckpointError
from engine.models.family import Family
from engine.models.registry import FAMILY_OF_ARCHITECTURE

_DTYPES = {"float32", "bfloat16", "float16"}
_SAFETENSORS_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_MAX_HEADER_BYTES = 100 << 20
_MAX_SCALE_BLOCK = 1 << 16


def config_from_directory(path: Path) -> ModelConfig:
    """Read `path`/config.json.

    Raises:
        CheckpointError: see `read_config`.
    """
    file = read_json(path / "config.json")
    family = _family(file)
    scale_block_shape = _quantization(file, family)
    fields = file.with_defaults(family.defaults, family.aliases)
    hidden_size = fields.size("hidden_size")
    num_heads = fields.size("num_attention_heads")
    num_layers = fields.size("num_hidden_layers", limit=MAX_LAYERS)
    max_context_tokens = fields.size("max_position_embeddings")
    rope, local_rope = rope_from_fields(
        fields,
        max_context_tokens,
        has_partial_rotary=family.has_partial_rotary,
        aliases=family.rope_aliases,
    )
    if not family.is_context_scaled:
        max_context_tokens = scaled_context_tokens(rope, max_context_tokens)
    form = family.form(fields)
    num_kv_heads = fields.size("num_key_value_heads", num_heads)
    head_dim = fields.size("head_dim", hidden_size // num_heads)
    if form.latent is not None:  # what is cached: one vector, whatever the heads are made of
        num_kv_heads, head_dim = 1, form.latent.kv_rank + form.latent.rope_dim
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_context_tokens=max_context_tokens,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope,
        local_rope=local_rope,
        windows=family.windows(fields, num_layers),
        form=form,
        scale_block_shape=scale_block_shape,
        unused_tensors=_further_layers(fields, num_layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        bos_token_id=fields.optional_integer("bos_token_id"),
        eos_token_ids=_eos_token_ids(path, fields),
        dtype=_dtype(path, fields),
    )


def _family(fields: Fields) -> Family:
    named = fields.values.get("architectures")
    names = [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for name in names:
        if name in FAMILY_OF_ARCHITECTURE:
            return FAMILY_OF_ARCHITECTURE[name]
    raise CheckpointError(
        f"{fields.source}: architectures {names} are not supported; "
        f"supported are {', '.join(FAMILY_OF_ARCHITECTURE)}"
    )


def _quantization(fields: Fields, family: Family) -> tuple[int, int] | None:
    """The blocks that share a scale, for FP8; other methods that the family has need no more."""
    values = fields.values.get("quantization_config")
    if not isinstance(values, dict):
        return None
    method = values.get("quant_method")
    if method not in family.quantizations:
        raise CheckpointError(
            f"{fields.source}: the weights are quantised ({method!r}); "
            "use the unquantised checkpoint or a GGUF file"
        )
    if method != "fp8":
        return None
    shape = values.get("weight_block_size")
    if (
        not isinstance(shape, list)
        or len(shape) != 2
        or not all(isinstance(size, int) and 1 <= size <= _MAX_SCALE_BLOCK for size in shape)
    ):
        raise CheckpointError(f"{fields.source}: weight_block_size {shape!r} is not two sizes")
    return shape[0], shape[1]


def _further_layers(fields: Fields, num_layers: int) -> tuple[str, ...]:
    """Layers that predict more than the next token stand behind the last one (DeepSeek-V3)."""
    num_further = fields.integer("num_nextn_predict_layers", 0)
    if not 0 <= num_further <= MAX_LAYERS:
        raise CheckpointError(f"{fields.source}: num_nextn_predict_layers is {num_further}")
    return tuple(f"model.layers.{num_layers + index}." for index in range(num_further))


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
