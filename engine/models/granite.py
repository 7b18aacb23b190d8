"""Granite 3: Llama with a multiplier at each joint."""

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
        attention_scale=fields.number("attention_multiplier", 1.0),
        embedding_scale=fields.number("embedding_multiplier", 1.0),
        residual_scale=fields.number("residual_multiplier", 1.0),
        logit_scale=1.0 / fields.positive("logits_scaling", 1.0),
    )


GRANITE = Family(
    architecture="GraniteForCausalLM",
    gguf="granite",
    defaults={"max_position_embeddings": 2048},
    form=_form,
)
