"""What an operator asks of a worker's engine; what start-up computes from it are plans."""

from dataclasses import dataclass
from pathlib import Path

from engine.parallel.layout import ParallelLayout

_ONE_RANK = ParallelLayout()
KV_DTYPES = ("auto", "int8", "fp8")
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Defaults suit a CPU host that a few worker processes share."""

    dtype: str = "auto"
    """auto: the checkpoint's own when it is a float type, bfloat16 for quantised GGUF."""
    kv_dtype: str = "auto"
    """What the KV pool holds, and handovers carry. auto: what the model computes in; int8 or fp8
    (e4m3) take a byte a value and a scale for each head and token, and change answers a little.
    Prefill and decode must agree."""
    device: str = "auto"
    """auto: cuda when there is one, else cpu."""
    block_size_tokens: int = 16
    """Prefill and decode must agree."""
    kv_pool_bytes: int | None = None
    """None: `kv_memory_fraction` of the memory that is free once the model is loaded."""
    kv_memory_fraction: float | None = None
    """None: 0.9 of a CUDA device; of a CPU host's memory 0.05, but room for two contexts."""
    max_num_batched_tokens: int = 512
    """Tokens of one step, in each data shard; a prompt longer than what decoding leaves of it
    takes several steps."""
    shared_step_tokens_per_thread: int = 128
    """CPU only: the same for each thread of a step while somebody waits for its end: sequences
    that decode in it, or the worker whose cores it borrows. 128 tokens are 50 ms of a core for a
    model of 135 M parameters."""
    max_num_sequences: int = 64
    """Sequences in one step, in each data shard; more wait."""
    has_prefix_cache: bool = True
    max_context_tokens: int | None = None
    """None: what the model was trained for; else a lower bound on prompt + answer."""
    parallel: ParallelLayout = _ONE_RANK
    """Ranks of the worker by axis, such as tp=2,pp=2: one process each. Their number must be
    WORLD_SIZE, and RANK, MASTER_ADDR and MASTER_PORT say where they meet (torchrun sets them)."""
    expert_counts: Path | None = None
    """File of tokens by expert. One that is there decides at the start which rank has which expert,
    so that all have alike to do; at the end what was measured is written to it. None: neighbours
    together, as many on each rank."""
    num_spare_experts: int = 0
    """Experts of a layer that each rank has room for beyond its share: replicas of those that
    `expert_counts` shows to be hot."""
    num_micro_batches: int | None = None
    """Pieces of a step that pipeline stages compute at the same time. None: as many as end the
    step soonest."""
    micro_batch_overhead_tokens: int = 32
    """What a stage's pass over its weights costs, in tokens computed; more of it means fewer
    micro-batches."""
    num_threads: int | None = None
    """CPU threads of a step. None: as many as the cores given to this process."""
    step_timeout_s: float = 300.0
    """A step that takes longer is stuck: the worker ends, and its sequences go on elsewhere."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kv_dtype not in KV_DTYPES:
            raise ValueError(
                f"kv_dtype must be one of {', '.join(KV_DTYPES)}, got {self.kv_dtype!r}"
            )
        if self.device not in DEVICES:
            raise ValueError(f"device must be one of {', '.join(DEVICES)}, got {self.device!r}")
        for name in (
            "block_size_tokens",
            "max_num_sequences",
            "shared_step_tokens_per_thread",
            "micro_batch_overhead_tokens",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        floor = self.max_num_sequences + self.block_size_tokens
        if self.max_num_batched_tokens < floor:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_sequences + block_size_tokens = "
                f"{floor}, got {self.max_num_batched_tokens}"
            )
        if self.num_spare_experts < 0 or (self.num_spare_experts and self.expert_counts is None):
            raise ValueError(
                f"num_spare_experts must be at least 0, got {self.num_spare_experts}, and above 0 "
                "needs expert_counts, which says whose replicas they are"
            )
        for name in (
            "kv_pool_bytes",
            "max_context_tokens",
            "num_threads",
            "num_micro_batches",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.step_timeout_s <= 1e6:
            raise ValueError(f"step_timeout_s must be in (0, 1e6], got {self.step_timeout_s}")
        if self.kv_memory_fraction is not None and not 0 < self.kv_memory_fraction <= 1:
            raise ValueError(f"kv_memory_fraction must be in (0, 1], got {self.kv_memory_fraction}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CollectivesConfig:
    """Time-outs and buffers of a rank group."""

    collective_timeout_s: float = 30.0
    """The longest wait for another rank in one collective; then the group is given up."""
    join_timeout_s: float = 300.0
    """The longest wait for all ranks to start."""
    collective_buffer_bytes: int = 256 * 1024
    """Shared memory a rank writes at a time; larger tensors go in pieces. Twice this a rank."""
    has_shared_memory: bool = True
    """Ranks of one host exchange through memory; else over TCP, as with other hosts."""
    mailbox_bytes: int = 4 * 1024 * 1024
    """Shared memory from one rank to another; a send that fits does not wait for its receiver."""

    def __post_init__(self) -> None:
        for name in ("collective_timeout_s", "join_timeout_s"):
            if not 0 < getattr(self, name) <= 1e6:
                raise ValueError(f"{name} must be in (0, 1e6], got {getattr(self, name)}")
        for name in ("collective_buffer_bytes", "mailbox_bytes"):
            if not 64 * 1024 <= getattr(self, name) <= 1 << 30:
                raise ValueError(f"{name} must be in [65536, 2**30], got {getattr(self, name)}")
