"""What a model is: one frozen value, read from a Hugging Face config.json or from GGUF metadata."""

from dataclasses import dataclass, field

from engine.checkpoint.form import ModelForm
from engine.errors import CheckpointError

MAX_LAYERS = 4096
MAX_CONTEXT_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeConfig:
    """Rotary embedding and its scaling; the names are those of transformers' `rope_parameters`."""

    theta: float = 10000.0
    scaling: str = "default"
    """default, linear, dynamic, yarn, longrope, llama3, proportional, or factors (GGUF)."""
    factor: float | None = None
    original_max_context_tokens: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated_share: float = 1.0
    """The share of a head's dims that turn: its first, or for proportional, the first pairs."""

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise CheckpointError(f"rope_theta must be more than 1, got {self.theta}")
        if self.original_max_context_tokens is not None and not (
            2 <= self.original_max_context_tokens <= MAX_CONTEXT_TOKENS
        ):
            raise CheckpointError(
                f"original_max_position_embeddings must be in [2, {MAX_CONTEXT_TOKENS}], "
                f"got {self.original_max_context_tokens}"
            )
        for name in (
            "factor",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "low_freq_factor",
            "high_freq_factor",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise CheckpointError(f"rope scaling: {name} must be positive, got {value}")
        if min(*self.short_factor, *self.long_factor, 1.0, 1.0) <= 0:
            raise CheckpointError("rope scaling: short_factor and long_factor must be positive")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and high <= low:
            raise CheckpointError(
                f"high_freq_factor ({high}) must be above low_freq_factor ({low})"
            )
        if not 0 <= self.rotated_share <= 1:
            raise CheckpointError(
                f"partial_rotary_factor must be in [0, 1], got {self.rotated_share}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that the forward pass and the scheduler need to know of a checkpoint."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    """For each layer, how many positions a query sees, itself included; None is all."""
    form: ModelForm = field(default_factory=ModelForm)
    local_rope: RopeConfig | None = None
    """The rotary embedding of layers with a window; None is `rope`."""
    scale_block_shape: tuple[int, int] | None = None
    """Rows and columns that share a scale where matrices are stored in FP8."""
    unused_tensors: tuple[str, ...] = ()
    """Prefixes of tensors that checkpoints of this family carry and this model does not need."""
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: frozenset[int] = frozenset()
    dtype: str = "float32"
    """What `dtype="auto"` means for this checkpoint: float32, bfloat16 or float16."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_context_tokens",
        ):
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} must be positive, got {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even, got {self.head_dim}")
        if self.rotary_dim % 2 or not 2 <= self.rotary_dim <= self.head_dim:
            raise CheckpointError(
                f"an even number of dims must be rotated, at least 2: got {self.rotary_dim} "
                f"(partial_rotary_factor {self.rope.rotated_share})"
            )
        if self.rope.scaling == "dynamic" and self.head_dim == 2:
            raise CheckpointError("dynamic rope scaling needs a head_dim above 2")
        if self.max_context_tokens > MAX_CONTEXT_TOKENS:
            raise CheckpointError(
                f"the context of {self.max_context_tokens} tokens (scaling included) is above "
                f"{MAX_CONTEXT_TOKENS}"
            )
        if self.rms_norm_eps < 0:
            raise CheckpointError(f"rms_norm_eps must not be negative, got {self.rms_norm_eps}")
        if any(not 0 <= token_id < self.vocab_size for token_id in self.eos_token_ids):
            raise CheckpointError(
                f"eos_token_id {sorted(self.eos_token_ids)} is outside the vocabulary of "
                f"{self.vocab_size}"
            )
        if len(self.windows) != self.num_layers:
            raise CheckpointError(f"{len(self.windows)} windows for {self.num_layers} layers")
        if any(window is not None and window < 1 for window in self.windows):
            raise CheckpointError(f"sliding_window must be positive, got {self.windows}")

    @property
    def rotary_dim(self) -> int:
        """The dims of a head that the rotary embedding turns, or leaves at angle 0."""
        if self.form.latent is not None:
            return self.form.latent.rope_dim
        if self.rope.scaling == "proportional":
            return self.head_dim
        return int(self.head_dim * self.rope.rotated_share)

    @property
    def num_kv_parts(self) -> int:
        """Key and value, or one latent vector that is both."""
        return 1 if self.form.latent is not None else 2

    @property
    def rope_length_threshold_tokens(self) -> int | None:
        """Prompts longer than this turn every key by an angle that depends on the prompt's length.

        None when keys depend on their position only. Above the threshold KV must not be shared
        between prompts of different lengths: see `rope_salt`.
        """
        if self.rope.scaling in {"dynamic", "longrope"}:
            return self.rope.original_max_context_tokens
        return None

    def rope_salt(self, num_prompt_tokens: int) -> int:
        """What else than the tokens decides a prompt's keys; mix it into prefix hashes unless 0."""
        threshold = self.rope_length_threshold_tokens
        if threshold is None or num_prompt_tokens <= threshold:
            return 0
        return num_prompt_tokens if self.rope.scaling == "dynamic" else 1


def scaled_context_tokens(rope: RopeConfig, max_context_tokens: int) -> int:
    """The context that a scaling allows, from the one that the checkpoint names.

    Checkpoints name the context before linear and dynamic scaling, and either one for yarn.
    """
    if rope.factor is None:
        return max_context_tokens
    if rope.scaling in {"linear", "dynamic"}:
        return int(max_context_tokens * rope.factor)
    if rope.scaling == "yarn" and rope.original_max_context_tokens is not None:
        return max(max_context_tokens, int(rope.original_max_context_tokens * rope.factor))
    return max_context_tokens
