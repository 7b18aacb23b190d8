"""Qwen3, dense: queries and keys are normalised head by head before they are rotated."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of
from engine.models.qwen2 import qwen_windows


def _form(fields: Fields) -> ModelForm:
    has_bias = fields.flag("attention_bias", default=False)
    return ModelForm(
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=activation_of(fields),
    )


QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    gguf="qwen3",
    defaults={
        "head_dim": 128,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    windows=qwen_windows,
    form=_form,
)
