"""Mixtral: Mistral with a mixture of experts in every layer."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ExpertsForm, ModelForm, RouterForm
from engine.models.family import Family, activation_of
from engine.models.windows import same_window


def _form(fields: Fields) -> ModelForm:
    return ModelForm(
        activation=activation_of(fields),
        experts=ExpertsForm(
            num_experts=fields.size("num_local_experts"),
            num_chosen=fields.size("num_experts_per_tok"),
            intermediate_size=fields.size("intermediate_size"),
            layers=frozenset(range(fields.size("num_hidden_layers"))),
            block="block_sparse_moe",
            names=("w1", "w3", "w2"),
            router=RouterForm(is_normalized=True),
        ),
    )


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    defaults={
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    windows=same_window,
    form=_form,
)
