"""DeepSeek-V3 and R1: V2 with experts scored by a sigmoid, and chosen with a bias that balances."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm, RouterForm
from engine.models.deepseek_v2 import (
    DEEPSEEK_DEFAULTS,
    deepseek_experts,
    latent_form,
    latent_scale,
)
from engine.models.family import Family, activation_of


def _form(fields: Fields) -> ModelForm:
    fields.only("scoring_func", "sigmoid")
    fields.only("topk_method", "noaux_tc")
    router = RouterForm(
        scoring="sigmoid",
        is_normalized=fields.flag("norm_topk_prob", default=True),
        scale=fields.number("routed_scaling_factor", 2.5),
        has_correction_bias=True,
        num_groups=fields.size("n_group"),
        num_chosen_groups=fields.size("topk_group"),
        group_score="best_two",
    )
    return ModelForm(
        activation=activation_of(fields),
        attention_scale=latent_scale(fields),
        latent=latent_form(fields),
        experts=deepseek_experts(fields, router),
    )


DEEPSEEK_V3 = Family(
    architecture="DeepseekV3ForCausalLM",
    defaults={
        **DEEPSEEK_DEFAULTS,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "first_k_dense_replace": 3,
    },
    form=_form,
    quantizations=frozenset({"fp8"}),
)
