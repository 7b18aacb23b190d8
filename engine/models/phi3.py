"""Phi-3, Phi-3.5 and Phi-4: fused tensors, longrope, and heads that turn in part (Phi-4-mini)."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of
from engine.models.windows import same_window


def _form(fields: Fields) -> ModelForm:
    return ModelForm(
        qkv_names=("qkv_proj",),
        gate_up_names=("gate_up_proj",),
        activation=activation_of(fields),
    )


PHI3 = Family(
    architecture="Phi3ForCausalLM",
    gguf="phi3",
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 32000,
    },
    windows=same_window,
    form=_form,
    has_partial_rotary=True,
    rope_aliases={"yarn": "longrope"},
)
