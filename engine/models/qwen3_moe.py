"""Qwen3-MoE (Qwen3-30B-A3B): Qwen3 with experts."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of
from engine.models.qwen2_moe import qwen_experts
from engine.models.windows import window_if_used


def _form(fields: Fields) -> ModelForm:
    has_bias = fields.flag("attention_bias", default=False)
    return ModelForm(
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=activation_of(fields),
        experts=qwen_experts(fields, shared_size=0),
    )


QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    gguf="qwen3moe",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    windows=window_if_used,
    form=_form,
    aliases={"num_local_experts": "num_experts"},
    gguf_defaults={"norm_topk_prob": True},
)
