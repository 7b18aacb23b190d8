"""OLMo 2: norms after each part instead of before, queries and keys normalised at full width."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import NORMS_AFTER, ModelForm, NormForm
from engine.models.family import Family, activation_of


def _form(fields: Fields) -> ModelForm:
    has_bias = fields.flag("attention_bias", default=False)
    return ModelForm(
        norms=NORMS_AFTER,
        norm=NormForm(is_wide=True),
        qk_norm="full",
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=activation_of(fields),
    )


OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    gguf="olmo2",
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "eos_token_id": 50279},
    form=_form,
)
