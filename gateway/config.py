"""What an operator may set for a gateway."""

from dataclasses import dataclass, field

from gateway.session import RecoveryConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """One gateway process."""

    model: str
    """Hugging Face directory, GGUF file or Hugging Face id: tokenizer and chat template."""
    model_id: str = ""
    """Name that clients use; empty: taken from the model's path or id."""
    host: str = "127.0.0.1"
    http_port: int = 8000
    """0 takes a free one, as for grpc_port."""
    grpc_port: int = 50051
    redis_url: str = "redis://127.0.0.1:6379/0"
    max_num_sequences: int = 1024
    """Open at once; more are answered with 429 and RESOURCE_EXHAUSTED."""
    drain_grace_s: float = 10.0
    """Open requests have this long to end after SIGTERM."""
    ready_file: str = ""
    """Gets one line of JSON with the bound addresses, once the gateway serves; empty: none."""
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model must be set: a directory, a GGUF file or an id")
        for name in ("http_port", "grpc_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                raise ValueError(f"{name} must be in [0, 65535], got {port}")
        if self.max_num_sequences < 1:
            raise ValueError(f"max_num_sequences must be at least 1, got {self.max_num_sequences}")
        if self.drain_grace_s < 0:
            raise ValueError(f"drain_grace_s must not be negative, got {self.drain_grace_s}")
