"""Gemma 3, text: five layers with a window for each without, two rope bases, norms on q and k."""

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
        qk_norm="head",
        qkv_bias=has_bias,
        output_bias=has_bias,
        activation=activation_of(fields, "hidden_activation"),
        attention_scale=fields.size("query_pre_attn_scalar") ** -0.5,
        # transformers' Gemma 3 has these fields too, and applies the second only.
        logit_cap=fields.optional_number("final_logit_softcapping"),
        embedding_scale=fields.size("hidden_size") ** 0.5,
    )


GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    gguf="gemma3",
    defaults={
        "max_position_embeddings": 131072,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "sliding_window_pattern": 6,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
    },
    windows=windows_by_type,
    form=_form,
    is_context_scaled=True,
)
