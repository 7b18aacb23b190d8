"""gpt-oss: sinks in the softmax, a window on every second layer, biases everywhere, experts."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import (
    SWIGLU_ALPHA,
    SWIGLU_LIMIT,
    ExpertsForm,
    ModelForm,
    NormForm,
    RouterForm,
)
from engine.models.family import Family
from engine.models.windows import windows_by_type


def _form(fields: Fields) -> ModelForm:
    fields.only("swiglu_alpha", SWIGLU_ALPHA)
    fields.only("swiglu_limit", SWIGLU_LIMIT)
    has_bias = fields.flag("attention_bias", default=True)
    return ModelForm(
        norm=NormForm(is_wide=True),
        qkv_bias=has_bias,
        output_bias=has_bias,
        has_sinks=True,
        activation="clamped_swiglu",
        experts=ExpertsForm(
            num_experts=fields.size("num_local_experts"),
            num_chosen=fields.size("num_experts_per_tok"),
            intermediate_size=fields.size("intermediate_size"),
            layers=frozenset(range(fields.size("num_hidden_layers"))),
            has_bias=True,
            is_stacked=True,
            router=RouterForm(name="router", has_bias=True, scoring="softmax_of_chosen"),
        ),
    )


GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    aliases={"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"},
    windows=windows_by_type,
    form=_form,
    quantizations=frozenset({"mxfp4"}),
)
