"""What a family declares of itself, for those who read its checkpoints and build its layers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.checkpoint.fields import Fields
from engine.checkpoint.form import Activation, ModelForm
from engine.errors import CheckpointError
from engine.models.windows import Windows, no_windows

_ACTIVATIONS: dict[object, Activation] = {
    "silu": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One entry of the registry; functions read the fields of a config.json."""

    architecture: str
    """As in the `architectures` of config.json."""
    form: Callable[[Fields], ModelForm]
    windows: Windows = no_windows
    defaults: Mapping[str, object] = field(default_factory=dict)
    """Fields that files leave out, as transformers' configuration class has them."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """From names that some files use for a field to the name that `form` reads."""
    gguf: str | None = None
    """`general.architecture` of a GGUF file; None: no such file can be read."""
    gguf_defaults: Mapping[str, object] = field(default_factory=dict)
    """Fields that a GGUF file does not have, as llama.cpp takes them."""
    has_partial_rotary: bool = False
    is_context_scaled: bool = False
    """max_position_embeddings counts what a scaling of the rotary embedding adds."""
    quantizations: frozenset[str] = frozenset()
    """Methods of `quantization_config` whose tensors can be read."""
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    """Scalings that this family's files name otherwise."""


def activation_of(fields: Fields, name: str = "hidden_act") -> Activation:
    """Read the gate's activation.

    Raises:
        CheckpointError: it is one that no kernel computes.
    """
    named = fields.values.get(name, "silu")
    if not isinstance(named, str) or named not in _ACTIVATIONS:
        raise CheckpointError(
            f"{fields.source}: {name} {named!r} is not supported "
            f"({', '.join(map(str, _ACTIVATIONS))})"
        )
    return _ACTIVATIONS[named]
