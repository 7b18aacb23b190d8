"""Qwen2-MoE (Qwen1.5-MoE-A2.7B): Qwen2 with experts, and one that every token visits."""

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import ExpertsForm, ModelForm, RouterForm
from engine.models.family import Family, activation_of
from engine.models.windows import windows_by_type


def qwen_experts(fields: Fields, *, shared_size: int) -> ExpertsForm:
    """Experts in every `decoder_sparse_step`th layer that `mlp_only_layers` does not name."""
    period = fields.size("decoder_sparse_step")
    dense = fields.integers("mlp_only_layers")
    return ExpertsForm(
        num_experts=fields.size("num_experts"),
        num_chosen=fields.size("num_experts_per_tok"),
        intermediate_size=fields.size("moe_intermediate_size"),
        layers=frozenset(
            index
            for index in range(fields.size("num_hidden_layers"))
            if index not in dense and (index + 1) % period == 0
        ),
        router=RouterForm(is_normalized=fields.flag("norm_topk_prob", default=False)),
        shared_size=shared_size,
        shared_name="shared_expert",
        shared_gate="shared_expert_gate" if shared_size else None,
    )


def _form(fields: Fields) -> ModelForm:
    return ModelForm(
        qkv_bias=fields.flag("qkv_bias", default=True),
        activation=activation_of(fields),
        experts=qwen_experts(fields, shared_size=fields.size("shared_expert_intermediate_size")),
    )


def _windows(fields: Fields, num_layers: int) -> tuple[int | None, ...]:
    """On every second layer, and unlike Qwen2's below `max_window_layers`."""
    if not fields.flag("use_sliding_window", default=False):
        return (None,) * num_layers
    if fields.values.get("layer_types") is not None:
        return windows_by_type(fields, num_layers)
    window = fields.size("sliding_window")
    last = fields.integer("max_window_layers")
    return tuple(window if index % 2 == 0 and index < last else None for index in range(num_layers))


QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    gguf="qwen2moe",
    defaults={
        "max_position_embeddings": 32768,
        "num_key_value_heads": 16,
        "sliding_window": 4096,
        "max_window_layers": 28,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
    },
    windows=_windows,
    form=_form,
)
