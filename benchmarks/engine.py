"""The engine alone, without a mesh: prefill rate and decode step time beside the machine's own.

python -m benchmarks.engine [--model PATH|demo] [--dtype auto] [--threads N] [--quick] [--json FILE]

Prefill is held against the rate of a 2048-cubed matrix product, decode against the time that
reading the weights and the context's keys and values takes; both rates are measured right before
each row, since other load on the host changes them.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import MachineProbe, MachineRates
from engine.checkpoint.read import read_config
from engine.config import EngineConfig
from engine.kernels import choose_kernels
from engine.kernels.interface import PackedLinear
from engine.kv_cache.batch import StepBatch
from engine.kv_cache.full_layout import full_kv_layout
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.models.build import load_model, resolve_dtype
from engine.models.causal_lm import CausalLM

FORMAT = "isthmus-engine-benchmark-1"
PREFILL_TOKENS = (128, 512, 2048)
DECODE_SEQUENCES = (1, 8, 32)
DECODE_CONTEXT_TOKENS = 256
BLOCK_SIZE_TOKENS = 16
CHUNK_TOKENS = 512
"""Longer prompts run in chunks of this size, as a prefill worker runs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured case and the machine's rates moments before it."""

    phase: str
    num_sequences: int
    num_tokens: int
    """Of the prompt, or of each sequence's context."""
    num_runs: int
    median_ms: float
    best_ms: float
    tokens_per_s: float
    machine: MachineRates
    bound_ms: float
    """What the machine's rate allows: of the matrix product for prefill, of memory for decode."""

    @property
    def share(self) -> float:
        """Of the machine's rate that was reached."""
        return self.bound_ms / self.median_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCost:
    """What one pass over the model needs at least."""

    linear_flop_per_token: float
    attention_flop_per_pair: float
    """For one query and one key, over all layers."""
    weight_bytes: int
    kv_bytes_per_token: int

    @classmethod
    def of(cls, model: CausalLM, layout: KvLayout) -> "ModelCost":
        packed = [
            found
            for module in model.modules()
            if isinstance(found := getattr(module, "packed", None), PackedLinear)
        ]
        sizes = [linear.in_features * linear.out_features for linear in packed]
        config = model.config
        return cls(
            linear_flop_per_token=2.0 * (sum(sizes) - config.vocab_size * config.hidden_size),
            attention_flop_per_pair=4.0 * config.num_heads * config.head_dim * config.num_layers,
            weight_bytes=sum(sizes) * model.dtype.itemsize,
            kv_bytes_per_token=layout.bytes_per_token,
        )

    def prefill_s(self, num_tokens: int, rates: MachineRates) -> float:
        """Time of the prompt's multiplications alone, causal pairs only."""
        pairs = num_tokens * (num_tokens + 1) / 2
        flop = num_tokens * self.linear_flop_per_token + pairs * self.attention_flop_per_pair
        return flop / rates.matrix_gflop_per_s / 1e9

    def decode_s(self, num_sequences: int, context: int, rates: MachineRates) -> float:
        """Time of reading weights and contexts once."""
        num_bytes = self.weight_bytes + num_sequences * context * self.kv_bytes_per_token
        return num_bytes / rates.read_gb_per_s / 1e9


class EngineBench:
    """A model with its pool, and the steps that are timed."""

    def __init__(self, path: Path, dtype: str, num_threads: int) -> None:
        self._dtype = resolve_dtype(dtype, read_config(path))
        self._num_threads = num_threads
        self.kernels = choose_kernels(torch.device("cpu"), self._dtype, num_threads)
        self._model = load_model(path, kernels=self.kernels, dtype=_dtype_name(self._dtype))
        self._probe = MachineProbe(self._dtype)
        self.use_kv("auto")

    def with_kv(self, kv_dtype: str) -> "EngineBench":
        """The same model with a pool of another precision."""
        other = copy(self)
        other.use_kv(kv_dtype)
        return other

    def use_kv(self, kv_dtype: str) -> None:
        """Take a new pool, of this precision."""
        config = EngineConfig(
            dtype=_dtype_name(self._dtype), kv_dtype=kv_dtype, block_size_tokens=BLOCK_SIZE_TOKENS
        )
        self.layout = full_kv_layout(self._model.config, config)
        most_tokens = max(*PREFILL_TOKENS, max(DECODE_SEQUENCES) * DECODE_CONTEXT_TOKENS)
        num_blocks = self.layout.num_blocks_for(most_tokens) + max(DECODE_SEQUENCES)
        self._pool = KvPool(self.layout, num_blocks, torch.device("cpu"))
        self._cost = ModelCost.of(self._model, self.layout)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Float32, of all positions of one prompt of at most PREFILL_TOKENS[-1]."""
        found = []
        for batch in self.prompt(len(token_ids)):
            chunk = torch.tensor(token_ids)[batch.position_T]
            found.append(self._model.logits(self._model(replace(batch, token_T=chunk), self._pool)))
        return torch.cat(found)

    def prompt(self, num_tokens: int) -> list[StepBatch]:
        """Its chunks, to be run one after the other."""
        starts = range(0, num_tokens, CHUNK_TOKENS)
        return [self._batch(1, start, min(start + CHUNK_TOKENS, num_tokens)) for start in starts]

    def prefill(self, num_tokens: int, limit_s: float) -> Row:
        """One prompt alone, first token's logits included."""
        steps = self.prompt(num_tokens)
        rates, times_s = self._timed(steps, limit_s)
        return _row(
            "prefill", 1, num_tokens, times_s, rates, self._cost.prefill_s(num_tokens, rates)
        )

    def decode(self, num_sequences: int, limit_s: float) -> Row:
        """One token of each sequence, whose context ends with it."""
        context = DECODE_CONTEXT_TOKENS
        rates, times_s = self._timed(self.decode_step(num_sequences), limit_s)
        bound_s = self._cost.decode_s(num_sequences, context, rates)
        return _row("decode", num_sequences, context, times_s, rates, bound_s)

    def decode_step(self, num_sequences: int) -> list[StepBatch]:
        context = DECODE_CONTEXT_TOKENS
        return [self._batch(num_sequences, context - 1, context)]

    def _timed(
        self, steps: Sequence[StepBatch], limit_s: float
    ) -> tuple[MachineRates, list[float]]:
        self.run(steps)
        rates = self._probe.rates(self._num_threads)
        times_s: list[float] = []
        end_s = time.perf_counter() + limit_s
        while len(times_s) < 5 or time.perf_counter() < end_s:
            start_s = time.perf_counter()
            self.run(steps)
            times_s.append(time.perf_counter() - start_s)
        return rates, times_s

    def run(self, steps: Sequence[StepBatch]) -> None:
        """Compute them, and the last one's logits to draw from."""
        for batch in steps:
            hidden = self._model(batch, self._pool)
        self._model.logits(hidden[batch.query_start_B1[1:].long() - 1])

    def _batch(self, num_sequences: int, start: int, end: int) -> StepBatch:
        """Positions [start, end) of each sequence; all sequences are alike."""
        width = self._pool.layout.num_blocks_for(end)
        table_of_blocks = torch.arange(num_sequences * width).view(num_sequences, width)
        positions = torch.arange(start, end)
        slots = table_of_blocks[:, positions // BLOCK_SIZE_TOKENS] * BLOCK_SIZE_TOKENS
        num_tokens = num_sequences * (end - start)
        return StepBatch(
            token_T=torch.arange(num_tokens) % self._model.config.vocab_size,
            position_T=positions.repeat(num_sequences),
            slot_T=(slots + positions % BLOCK_SIZE_TOKENS).flatten(),
            block_table_BW=table_of_blocks.int(),
            query_start_B1=torch.arange(0, num_tokens + 1, end - start, dtype=torch.int32),
            context_len_B=torch.full((num_sequences,), end, dtype=torch.int32),
            query_lens=(end - start,) * num_sequences,
            context_lens=(end,) * num_sequences,
            num_threads=self._num_threads,
        )


def _row(
    phase: str,
    num_sequences: int,
    num_tokens: int,
    times_s: Sequence[float],
    rates: MachineRates,
    bound_s: float,
) -> Row:
    median_s = statistics.median(times_s)
    computed = num_tokens if phase == "prefill" else num_sequences
    return Row(
        phase=phase,
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        num_runs=len(times_s),
        median_ms=median_s * 1e3,
        best_ms=min(times_s) * 1e3,
        tokens_per_s=computed / median_s,
        machine=rates,
        bound_ms=bound_s * 1e3,
    )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(rows: Sequence[Row], title: str) -> Table:
    """One line a row, with the bound it is held against."""
    result = Table(title=title)
    for heading in ("case", "median ms", "best ms", "tokens/s", "machine", "bound ms", "reached"):
        result.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        is_prefill = row.phase == "prefill"
        case = f"{row.num_tokens} tokens" if is_prefill else f"batch {row.num_sequences}"
        machine = (
            f"{row.machine.matrix_gflop_per_s:.0f} GF/s"
            if is_prefill
            else f"{row.machine.read_gb_per_s:.1f} GB/s"
        )
        reached = f"{row.share:.0%}" if is_prefill else f"{1 / row.share:.2f} x"
        result.add_row(
            *(f"{row.phase}, {case}", f"{row.median_ms:.2f}", f"{row.best_ms:.2f}"),
            *(f"{row.tokens_per_s:.0f}", machine, f"{row.bound_ms:.2f}", reached),
        )
    return result


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; leaves the process on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--model", default="demo", help="a path, or demo")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float32 or float16")
    parser.add_argument(
        "--threads", type=int, action="append", help="repeat; one and all cores by default"
    )
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure all cases; returns the exit status."""
    options = parsed(arguments)
    path = model_path(options.model)
    limit_s = 0.5 if options.quick else 2.0
    num_cores = len(os.sched_getaffinity(0))
    console = Console()
    runs = {}
    for num_threads in options.threads or sorted({1, num_cores}, reverse=True):
        bench = EngineBench(path, options.dtype, num_threads)
        rows = []
        with console.status("measuring") as status:
            for num_tokens in PREFILL_TOKENS:
                status.update(f"prefill of {num_tokens} tokens, {num_threads} threads")
                rows.append(bench.prefill(num_tokens, limit_s))
            for num_sequences in DECODE_SEQUENCES:
                status.update(f"decode of {num_sequences} sequences, {num_threads} threads")
                rows.append(bench.decode(num_sequences, limit_s))
        console.print(table(rows, f"{path.name}, {bench.kernels.name}, {num_threads} threads"))
        runs[num_threads] = [{**asdict(row), "share": row.share} for row in rows]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        outcome = {"format": FORMAT, "model": path.name, "kernels": bench.kernels.name}
        options.json.write_bytes(msgspec.json.encode({**outcome, "rows_by_threads": runs}))
    return 0


def model_path(model: str) -> Path:
    if model != "demo":
        return Path(model)
    from deploy.up import located_model  # only the demo model needs the launcher

    return located_model(model, os.environ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
