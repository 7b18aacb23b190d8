"""DeepSeek-V2: multi-head latent attention; experts in groups, and some that every token visits."""

import math
from collections.abc import Mapping

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ExpertsForm, LatentForm, ModelForm, RouterForm
from engine.errors import CheckpointError
from engine.models.family import Family, activation_of

DEEPSEEK_DEFAULTS: Mapping[str, object] = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def latent_form(fields: Fields) -> LatentForm:
    rank = fields.optional_integer("q_lora_rank")
    return LatentForm(
        query_rank=None if rank is None else fields.size("q_lora_rank"),
        kv_rank=fields.size("kv_lora_rank"),
        nope_dim=fields.size("qk_nope_head_dim"),
        rope_dim=fields.size("qk_rope_head_dim"),
        value_dim=fields.size("v_head_dim"),
        is_interleaved=fields.flag("rope_interleave", default=True),
        has_bias=fields.flag("attention_bias", default=False),
    )


def latent_scale(fields: Fields) -> float:
    """Of the head before it is absorbed; yarn makes it larger by what it takes from cos and sin."""
    latent = latent_form(fields)
    scale: float = (latent.nope_dim + latent.rope_dim) ** -0.5
    raw = fields.values.get("rope_scaling") or fields.values.get("rope_parameters") or {}
    rope = Fields(f"{fields.source}: rope_parameters", raw if isinstance(raw, dict) else {})
    share = rope.number("mscale_all_dim", 0.0)
    factor = rope.number("factor", 1.0)
    is_scaled = rope.values.get("rope_type", rope.values.get("type", "default")) != "default"
    if not is_scaled or not share or factor <= 1:
        return scale
    return scale * (0.1 * share * math.log(factor) + 1.0) ** 2


def deepseek_experts(fields: Fields, router: RouterForm) -> ExpertsForm:
    """Experts in every layer from `first_k_dense_replace` on."""
    fields.only("moe_layer_freq", 1)
    size = fields.size("moe_intermediate_size")
    num_layers = fields.size("num_hidden_layers")
    return ExpertsForm(
        num_experts=fields.size("n_routed_experts"),
        num_chosen=fields.size("num_experts_per_tok"),
        intermediate_size=size,
        layers=frozenset(range(fields.integer("first_k_dense_replace"), num_layers)),
        router=router,
        shared_size=size * (fields.optional_integer("n_shared_experts") or 0),
        shared_name="shared_experts",
    )


def _router(fields: Fields) -> RouterForm:
    scale = fields.number("routed_scaling_factor", 1.0)
    fields.only("scoring_func", "softmax")
    fields.only("norm_topk_prob", value=False)  # DeepSeek's code and transformers differ on it
    method = fields.values.get("topk_method")
    if method == "greedy":
        return RouterForm(scale=scale)
    if method != "group_limited_greedy":
        raise CheckpointError(f"{fields.source}: topk_method {method!r} is not supported")
    return RouterForm(
        scale=scale,
        num_groups=fields.size("n_group"),
        num_chosen_groups=fields.size("topk_group"),
    )


def _form(fields: Fields) -> ModelForm:
    return ModelForm(
        mlp_bias=fields.flag("mlp_bias", default=False),
        activation=activation_of(fields),
        attention_scale=latent_scale(fields),
        latent=latent_form(fields),
        experts=deepseek_experts(fields, _router(fields)),
    )


DEEPSEEK_V2 = Family(
    architecture="DeepseekV2ForCausalLM",
    defaults={
        **DEEPSEEK_DEFAULTS,
        "max_position_embeddings": 2048,
        "moe_intermediate_size": 1407,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "topk_method": "greedy",
    },
    form=_form,
)
