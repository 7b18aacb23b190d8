"""How a family's layers are put together, as one frozen value; the defaults are Llama's.

`engine.models` has one file for each family, which fills this in; `engine.layers` builds from it.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.errors import CheckpointError

MAX_EXPERTS = 4096

Activation = Literal["silu", "gelu_tanh", "clamped_swiglu"]
"""Of the gate, before it is multiplied with `up`; clamped_swiglu is gpt-oss' own product."""

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
"""Of clamped_swiglu; every gpt-oss checkpoint has these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NormPlacement:
    """The norm's tensor before and after each part of a layer; None is no norm there.

    A norm after a part stands before the residual addition.
    """

    before_attention: str | None = None
    after_attention: str | None = None
    before_mlp: str | None = None
    after_mlp: str | None = None


NORMS_BEFORE = NormPlacement(
    before_attention="input_layernorm", before_mlp="post_attention_layernorm"
)
NORMS_AFTER = NormPlacement(
    after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm"
)
NORMS_AROUND = NormPlacement(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class NormForm:
    """What a norm does with its weight."""

    offset: float = 0.0
    """Added to the weight (Gemma: 1)."""
    is_wide: bool = False
    """The weight is multiplied in float32, before the result is rounded (Llama: after)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterForm:
    """How the experts of a token are chosen and weighed."""

    name: str = "gate"
    has_bias: bool = False
    scoring: Literal["softmax", "sigmoid", "softmax_of_chosen"] = "softmax"
    is_normalized: bool = False
    """The weights of the chosen experts are divided by their sum."""
    scale: float = 1.0
    has_correction_bias: bool = False
    """A bias that takes part in choosing, not in weighing (DeepSeek-V3)."""
    num_groups: int = 1
    num_chosen_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"

    def __post_init__(self) -> None:
        if not 1 <= self.num_chosen_groups <= self.num_groups <= MAX_EXPERTS:
            raise CheckpointError(
                f"topk_group ({self.num_chosen_groups}) must be in [1, n_group "
                f"({self.num_groups})], and n_group at most {MAX_EXPERTS}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsForm:
    """A mixture of experts in place of the feed-forward block of some layers."""

    num_experts: int
    num_chosen: int
    """Experts per token."""
    intermediate_size: int
    """Features of one expert."""
    layers: frozenset[int]
    """Which layers are mixtures; the others are dense."""
    block: str = "mlp"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    has_bias: bool = False
    is_stacked: bool = False
    """A directory holds all experts of a layer as one tensor (gpt-oss)."""
    router: RouterForm = field(default_factory=RouterForm)
    shared_size: int = 0
    """Features of the expert that every token visits; 0 is none."""
    shared_name: str = "shared_experts"
    shared_gate: str | None = None
    """A projection to one number, whose sigmoid weighs the shared expert (Qwen2-MoE)."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_chosen <= self.num_experts <= MAX_EXPERTS:
            raise CheckpointError(
                f"experts per token ({self.num_chosen}) must be in [1, the number of experts "
                f"({self.num_experts})], and that at most {MAX_EXPERTS}"
            )
        router = self.router
        if self.num_experts % router.num_groups:
            raise CheckpointError(
                f"the number of experts ({self.num_experts}) must be a multiple of n_group "
                f"({router.num_groups})"
            )
        group_size = self.num_experts // router.num_groups
        if self.num_chosen > group_size * router.num_chosen_groups:
            raise CheckpointError(
                f"experts per token ({self.num_chosen}) must fit in topk_group "
                f"({router.num_chosen_groups}) groups of {group_size}"
            )
        if router.group_score == "best_two" and group_size < 2:
            raise CheckpointError("groups scored by their best two experts need two each")


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentForm:
    """Multi-head latent attention (DeepSeek-V2): one latent vector a token is cached.

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
    """

    query_rank: int | None
    """None: queries are projected in one step."""
    kv_rank: int
    nope_dim: int
    """Dims of a head that are not rotated."""
    rope_dim: int
    value_dim: int
    is_interleaved: bool = True
    """Rotated pairs stand beside each other in the weights' rows."""
    has_bias: bool = False
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise CheckpointError(f"qk_rope_head_dim must be even, got {self.rope_dim}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelForm:
    """Everything of a layer that is not a size."""

    norms: NormPlacement = NORMS_BEFORE
    norm: NormForm = field(default_factory=NormForm)
    qk_norm: Literal["none", "head", "full"] = "none"
    """Queries and keys are normalised head by head, or all heads of a token together."""
    qkv_names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    """Three tensors, or one that holds them in this order."""
    gate_up_names: tuple[str, ...] = ("gate_proj", "up_proj")
    """Two tensors, or one that holds them in this order."""
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    attention_scale: float | None = None
    """None is head_dim ** -0.5."""
    score_cap: float | None = None
    """Attention scores become cap * tanh(score / cap)."""
    has_sinks: bool = False
    """One learnt score a head, which takes part in the softmax and attends to nothing."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """On what attention and feed-forward add to the residual."""
    logit_scale: float = 1.0
    logit_cap: float | None = None
    experts: ExpertsForm | None = None
    latent: LatentForm | None = None

    def __post_init__(self) -> None:
        for name in ("score_cap", "logit_cap", "attention_scale"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise CheckpointError(f"{name} must be positive, got {value}")
