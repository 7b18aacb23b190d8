"""What a mesh on one machine is asked to be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.parallel.layout import ParallelLayout
from engine.runtime.core_share import MAX_WORKERS

_ONE_RANK = ParallelLayout()
WORKER_ROLES = ("prefill", "decode")
_PROGRAMS = {
    "prefill": ("-m", "prefill_worker"),
    "decode": ("-m", "decode_worker"),
    "gateway": ("-m", "gateway"),
    "store": ("-m", "kv_transfer"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MeshConfig:
    """What `isthmus up` was asked for."""

    model: str
    """A path; names are resolved before."""
    num_prefill: int = 1
    num_decode: int = 1
    http_port: int = 8000
    """0 picks a free one, as for grpc_port."""
    grpc_port: int = 50051
    prefill_parallel: ParallelLayout = _ONE_RANK
    """Ranks of each prefill worker, by axis."""
    decode_parallel: ParallelLayout = _ONE_RANK
    has_store: bool = False
    """Whether a store of KV blocks runs beside the workers."""
    redis_url: str = ""
    """Empty: a private Redis is started."""
    dtype: str = "auto"
    kv_dtype: str = "auto"
    """Of all pools and the store; each refuses another's."""
    device: str = "auto"
    state_file: Path | None = None
    programs: Mapping[str, Sequence[str]] = field(default_factory=lambda: dict(_PROGRAMS))
    """What Python runs for each role, before the flags."""
    ready_timeout_s: float = 120.0
    drain_grace_s: float = 10.0
    """How long answers that are open at the first Ctrl-C have to end, for each kind of process."""

    def __post_init__(self) -> None:
        if self.num_prefill < 0:
            raise ValueError(f"--prefill must be at least 0, got {self.num_prefill}")
        if self.num_decode < 1:
            raise ValueError(f"--decode must be at least 1, got {self.num_decode}")
        for flag, port in (("--http-port", self.http_port), ("--grpc-port", self.grpc_port)):
            if not 0 <= port <= 65535:
                raise ValueError(f"{flag} must be in [0, 65535], got {port}")
        if self.http_port == self.grpc_port != 0:
            raise ValueError(f"--http-port and --grpc-port are both {self.http_port}")

        if self.num_ranks > MAX_WORKERS:
            raise ValueError(
                f"--prefill {self.num_prefill} workers of {self.prefill_parallel} and --decode "
                f"{self.num_decode} of {self.decode_parallel} are {self.num_ranks} processes; "
                f"one host runs at most {MAX_WORKERS}"
            )

    @property
    def num_ranks(self) -> int:
        """Processes of all workers together."""
        return (
            self.num_prefill * self.prefill_parallel.num_ranks
            + self.num_decode * self.decode_parallel.num_ranks
        )

    def parallel(self, role: str) -> ParallelLayout:
        """The layout of each worker of a role."""
        return self.prefill_parallel if role == "prefill" else self.decode_parallel

    @property
    def worker_names(self) -> list[str]:
        counts = {"prefill": self.num_prefill, "decode": self.num_decode}
        return [f"{role}-{index}" for role in WORKER_ROLES for index in range(counts[role])]
