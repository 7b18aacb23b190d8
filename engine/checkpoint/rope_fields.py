"""RopeConfig from the fields of a Hugging Face config.json, in every form that they have had."""

from collections.abc import Mapping

from engine.checkpoint.config import RopeConfig
from engine.checkpoint.fields import Fields
from engine.errors import CheckpointError

_SCALINGS = {"default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}
_ALIASES = {"su": "longrope"}
_LAYER_KINDS = {"full_attention", "sliding_attention"}


def rope_from_fields(
    fields: Fields,
    max_context_tokens: int,
    *,
    has_partial_rotary: bool,
    aliases: Mapping[str, str],
) -> tuple[RopeConfig, RopeConfig | None]:
    """Read `rope_parameters` (transformers 5) or `rope_theta` with `rope_scaling` (before).

    Returns:
        The rotary embedding of a model, and that of its layers with a window where it is another.

    Raises:
        CheckpointError: a scaling is unknown, or lacks a number.
    """
    raw = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        raise CheckpointError(f"{fields.source}: rope_parameters must be an object")
    local_theta = fields.optional_number("rope_local_base_freq")
    local = None if local_theta is None else RopeConfig(theta=local_theta)

    def read(values: Mapping[str, object]) -> RopeConfig:
        rope = Fields(f"{fields.source}: rope_parameters", values)
        config = _rope(fields, rope, max_context_tokens, {**_ALIASES, **aliases})
        share = config.rotated_share
        if share != 1.0 and config.scaling != "proportional" and not has_partial_rotary:
            raise CheckpointError(f"{rope.source}: partial_rotary_factor {share} is not supported")
        return config

    if local is None or not raw.keys() <= _LAYER_KINDS:
        if any(isinstance(value, dict) for value in raw.values()):
            raise CheckpointError(f"{fields.source}: rope_parameters must be one flat object")
        return read(raw), local
    full, sliding = raw.get("full_attention"), raw.get("sliding_attention")
    if sliding is not None:
        local = read({"rope_theta": local_theta, **_mapping(fields, sliding)})
    return read(_mapping(fields, full or {})), local


def _mapping(fields: Fields, value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{fields.source}: rope_parameters must hold objects")
    return value


def _rope(
    fields: Fields, rope: Fields, max_context_tokens: int, aliases: Mapping[str, str]
) -> RopeConfig:
    scaling = rope.values.get("rope_type", rope.values.get("type", "default"))
    scaling = aliases.get(scaling, scaling) if isinstance(scaling, str) else scaling
    if not isinstance(scaling, str) or scaling not in _SCALINGS:
        raise CheckpointError(
            f"{rope.source}: type {scaling!r} is not supported; use one of {sorted(_SCALINGS)}"
        )
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
        rotated_share=rope.number(
            "partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)
        ),
    )
