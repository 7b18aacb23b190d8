"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ModelForm
from engine.models.family import Family, activation_of
from engine.models.windows import windows_by_type


def qwen_windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """Windows are off unless switched on, and then on from layer `max_window_layers` on."""
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    if fields.values.get("layer_types") is not None:
        return windows_by_type(fields, num_layers)
    window = fields.size("sliding_window")
    first = fields.integer("max_window_layers")
    return tuple(window if index >= first else None for index in range(num_layers))


def _form(fields: Fields) -> ModelForm:
    return ModelForm(qkv_bias=True, activation=activation_of(fields))


QWEN2 = Family(
    architecture="Qwen2ForCausalLM",
    gguf="qwen2",
    defaults={
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    windows=qwen_windows,
    form=_form,
)
