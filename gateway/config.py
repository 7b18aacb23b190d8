"""What an operator may set for a gateway."""

from dataclasses import dataclass
from pathlib import Path

from mesh.logs import LogFormat


@dataclass(frozen=True, kw_only=True, slots=True)
class GatewayConfig:
    """One gateway process."""

    model: str = "demo"
    """demo, a directory, a .gguf file or a Hugging Face id: tokenizer and chat template."""
    model_id: str = ""
    """Name that clients use and workers register; empty: taken from `model`."""
    redis_url: str = "redis://127.0.0.1:6379"
    host: str = "127.0.0.1"
    http_port: int = 8000
    """0 picks a free one, as for grpc_port."""
    grpc_port: int = 50051
    max_num_sequences: int = 1024
    """Open at once; more are answered with 429 and RESOURCE_EXHAUSTED."""
    drain_grace_s: float = 30.0
    """How long requests that are open at SIGTERM have to end."""
    ready_file: Path | None = None
    """Written once the gateway serves."""
    otlp_endpoint: str = ""
    """http://host:port of an OTLP gRPC receiver; empty: OTEL_EXPORTER_OTLP_ENDPOINT, if set."""
    log_level: str = "info"
    log_format: LogFormat = LogFormat.HUMAN

    def __post_init__(self) -> None:
        for name in ("http_port", "grpc_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise ValueError(f"{name} must be in [0, 65535], got {getattr(self, name)}")
        if self.max_num_sequences < 1:
            raise ValueError(f"max_num_sequences must be at least 1, got {self.max_num_sequences}")
        if self.drain_grace_s < 0:
            raise ValueError(f"drain_grace_s must be at least 0, got {self.drain_grace_s}")
