"""Gemma 2: capped scores and logits, a window on every second layer, norms around each part."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import NORMS_AROUND, ModelForm, NormForm
from engine.models.family import Family, activation_of
from engine.models.windows import windows_by_type


def _form(fields: Fields) -> ModelForm:
    fields.only("use_bidirectional_attention", value=False)
    has_bias = fields.flag("attention_bias", default=False)
    return ModelForm(
        norms=NORMS_AROUND,
        norm=NormForm(offset=1.0, is_wide=True),
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=activation_of(fields, "hidden_activation"),
        attention_scale=fields.size("query_pre_attn_scalar") ** -0.5,
        score_cap=fields.optional_number("attn_logit_softcapping"),
        logit_cap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=fields.size("hidden_size") ** 0.5,
    )


GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    gguf="gemma2",
    defaults={
        "max_position_embeddings": 8192,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 2,
    },
    windows=windows_by_type,
    form=_form,
)
