"""Llama 2 and 3.x, and what shares their form (SmolLM, TinyLlama)."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of


def _form(fields: Fields) -> ModelForm:
    has_bias = fields.flag("attention_bias", default=False)
    return ModelForm(
        qkv_bias=has_bias,
        output_bias=has_bias,
        mlp_bias=fields.flag("mlp_bias", default=False),
        activation=activation_of(fields),
    )


LLAMA = Family(
    architecture="LlamaForCausalLM",
    gguf="llama",
    defaults={"max_position_embeddings": 2048},
    form=_form,
)
