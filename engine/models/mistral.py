"""Mistral: Llama with a sliding window."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of
from engine.models.windows import same_window


def _form(fields: Fields) -> ModelForm:
    return ModelForm(activation=activation_of(fields))


MISTRAL = Family(
    architecture="MistralForCausalLM",
    defaults={
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    },
    windows=same_window,
    form=_form,
)
