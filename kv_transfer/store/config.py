"""Settings of the store."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreConfig:
    """How much a store keeps, and where."""

    memory_bytes: int = 1 << 30
    """KV blocks in host memory, which is taken at start-up."""
    spill_dir: Path | None = None
    """Where blocks go that memory has no room for; None: they are dropped. Of one store only."""
    spill_bytes: int = 16 << 30
    """Most that this store keeps there. Files of other models and precisions are not counted."""

    def __post_init__(self) -> None:
        for name in ("memory_bytes", "spill_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
