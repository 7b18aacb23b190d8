"""KV at lower precision: what it loses in logits, and what it saves.

python -m benchmarks.kv_precision [--model PATH|demo] [--text FILE] [--threads N] [--quick]
                                  [--json FILE]

A text is computed as it stands, in chunks, and the logits of all its positions are held against
those of float32 with float32 keys and values. Computed in float32, what differs is the pool's
doing alone; in bfloat16 the first row shows what that rounds by itself. Times are medians of
steps that take turns, since other load on the host changes them.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.engine import DECODE_CONTEXT_TOKENS, EngineBench, model_path
from benchmarks.logit_loss import LogitLoss, logit_loss
from engine.config import KV_DTYPES
from engine.kv_cache.batch import StepBatch
from gateway.tokenizer import load_text_model

FORMAT = "isthmus-kv-precision-benchmark-1"
DTYPES = ("float32", "bfloat16")
TEXTS = Path(__file__).parent.parent / "docs" / "decisions"
"""In the order of their names; nobody trained on them."""
NUM_TOKENS = 1024
DECODE_SEQUENCES = 8
MIN_WIDTH = 120
"""Columns that the table needs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One precision of the pool under one of the computation."""

    dtype: str
    kv_dtype: str
    bytes_per_token: int
    loss: LogitLoss
    prefill_ms: float
    """Of the whole text."""
    decode_ms: float
    """Of one step of DECODE_SEQUENCES sequences."""


def rows_of(
    plain: EngineBench,
    dtype: str,
    token_ids: Sequence[int],
    reference: torch.Tensor,
    limit_s: float,
) -> list[Row]:
    """All precisions of the pool, computed in `dtype`; timed for `limit_s` each way."""
    benches = {kv_dtype: plain.with_kv(kv_dtype) for kv_dtype in KV_DTYPES}
    losses = {
        kv_dtype: logit_loss(reference, bench.logits(token_ids))
        for kv_dtype, bench in benches.items()
    }
    prefill_ms = _median_ms(
        {kv_dtype: (bench, bench.prompt(len(token_ids))) for kv_dtype, bench in benches.items()},
        limit_s,
    )
    decode_ms = _median_ms(
        {
            kv_dtype: (bench, bench.decode_step(DECODE_SEQUENCES))
            for kv_dtype, bench in benches.items()
        },
        limit_s,
    )
    return [
        Row(
            dtype=dtype,
            kv_dtype=kv_dtype,
            bytes_per_token=bench.layout.bytes_per_token,
            loss=losses[kv_dtype],
            prefill_ms=prefill_ms[kv_dtype],
            decode_ms=decode_ms[kv_dtype],
        )
        for kv_dtype, bench in benches.items()
    ]


def _median_ms(
    cases: Mapping[str, tuple[EngineBench, Sequence[StepBatch]]], limit_s: float
) -> dict[str, float]:
    """Of each case's steps together; cases take turns, for `limit_s` in all."""
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    for bench, steps in cases.values():
        bench.run(steps)
    end_s = time.perf_counter() + limit_s
    while time.perf_counter() < end_s:
        for name, (bench, steps) in cases.items():
            start_s = time.perf_counter()
            bench.run(steps)
            times_s[name].append(time.perf_counter() - start_s)
    return {name: 1e3 * statistics.median(times) for name, times in times_s.items()}


def table(rows: Sequence[Row], title: str) -> Table:
    """One line a row; times are against the same computation with `auto`."""
    result = Table(title=title)
    headings = (
        *("computed in", "KV", "bytes/token", "logits: max", "mean", "KL: max", "mean"),
        *("greedy equal", "prefill", "decode"),
    )
    for index, heading in enumerate(headings):
        result.add_column(heading, justify="left" if index < 2 else "right")
    plain = {row.dtype: row for row in rows if row.kv_dtype == "auto"}
    for row in rows:
        loss, base = row.loss, plain[row.dtype]
        result.add_row(
            *(row.dtype, row.kv_dtype, str(row.bytes_per_token)),
            *(f"{loss.max_difference:.3f}", f"{loss.mean_difference:.4f}"),
            *(f"{loss.max_kl:.5f}", f"{loss.mean_kl:.6f}", f"{loss.greedy_share:.1%}"),
            f"{row.prefill_ms:.0f} ms, {row.prefill_ms / base.prefill_ms:.2f} x",
            f"{row.decode_ms:.1f} ms, {row.decode_ms / base.decode_ms:.2f} x",
        )
    return result


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; leaves the process on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kv_precision", description=__doc__)
    parser.add_argument("--model", default="demo", help="a path, or demo")
    parser.add_argument("--text", type=Path, metavar="FILE", help="by default docs/decisions")
    parser.add_argument("--threads", type=int, help="all cores by default")
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure all precisions; returns the exit status."""
    options = parsed(arguments)
    path = model_path(options.model)
    num_threads = options.threads or len(os.sched_getaffinity(0))
    limit_s = 5.0 if options.quick else 20.0
    texts = [options.text] if options.text else sorted(TEXTS.glob("[0-9]*.md"))
    text = "\n".join(each.read_text(encoding="utf-8") for each in texts)
    found = load_text_model(path).tokenizer.encode_now(text, add_special_tokens=True)
    token_ids = found[: NUM_TOKENS // 2 if options.quick else NUM_TOKENS]
    console = Console(width=max(MIN_WIDTH, Console().width))
    rows: list[Row] = []
    with console.status("measuring") as status:
        reference: torch.Tensor | None = None
        for dtype in DTYPES:
            status.update(f"{len(token_ids)} tokens in {dtype}")
            bench = EngineBench(path, dtype, num_threads)
            if reference is None:
                reference = bench.logits(token_ids)
            rows += rows_of(bench, dtype, token_ids, reference, limit_s)
    console.print(
        table(
            rows,
            f"{path.name}, {len(token_ids)} tokens of text beside float32; decode of "
            f"{DECODE_SEQUENCES} sequences at {DECODE_CONTEXT_TOKENS}; {num_threads} threads",
        )
    )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        outcome = {"format": FORMAT, "model": path.name, "rows": [asdict(row) for row in rows]}
        options.json.write_bytes(msgspec.json.encode(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
