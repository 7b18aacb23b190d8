"""Workers of several ranks on this host: what their collectives cost and what their layouts bring.

python -m benchmarks.parallel
python -m benchmarks.parallel --quick --only layouts
python -m benchmarks.parallel --device cuda --model PATH
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import torch

from benchmarks.ranks.checkpoints import write_dense, write_experts
from benchmarks.ranks.collectives import CollectiveRow, collectives_table, measure_collectives
from benchmarks.ranks.loads import CHUNK_TOKENS, Load, LoadRow, LoadsTask, measure_loads
from benchmarks.ranks.processes import text_table
from engine.parallel import ParallelLayout
from engine.parallel.kv_exchange import KvExchange
from engine.scheduling.micro_batch import bubble_share

FORMAT = "isthmus-parallel-4"
TABLES = ("collectives", "layouts", "overlap", "pipeline", "sequence", "experts")
LAYOUTS = ("1", "tp=2", "pp=2", "pp=2,interleave=2", "sp=2", "tp=3", "tp=2,pp=2")
PIPELINES = ("pp=2", "pp=2,interleave=2", "pp=3")
MICRO_BATCHES = (1, 2, 4, 8)
PROMPTS = ((2048, 512), (8192, 2048), (8192, 512), (32768, 512))
"""Tokens that are split along the sequence, and those of a step."""
EXCHANGES = (
    ("1", True, None),
    ("sp=2", True, KvExchange.GATHER),
    ("sp=2", False, KvExchange.GATHER),
    ("sp=2", False, KvExchange.RING),
)
"""Of their keys and values: layout, whether ranks share memory, and how."""
EXPERT_LAYOUTS = ("1", "tp=2", "tp=2,ep=2", "dp=2,ep=2")
SKEW = 4.0
"""Of the second expert table; see `write_experts`."""


@dataclass(frozen=True, slots=True)
class PipelineRow:
    """A prompt of one step, cut into so many micro-batches on stages that cost alike."""

    layout: str
    num_micro_batches: int
    median_ms: float
    bubble_share: float
    expected_share: float
    """(stages - 1) / (ranges * micro-batches + stages - 1), see `engine.scheduling.micro_batch`."""


@dataclass(slots=True)
class Outcome:
    """What the program writes; one field for each table."""

    device: str
    num_cores: int
    model: str
    format: str = FORMAT
    collectives: list[CollectiveRow] = field(default_factory=list)
    layouts: list[LoadRow] = field(default_factory=list)
    overlap: list[LoadRow] = field(default_factory=list)
    pipeline: list[PipelineRow] = field(default_factory=list)
    sequence: list[LoadRow] = field(default_factory=list)
    experts: dict[str, list[LoadRow]] = field(default_factory=dict)
    """By router: even or skewed."""


def loads(*, is_quick: bool) -> list[Load]:
    """What every layout is put under."""
    num_repeats, num_tokens = (2, 17) if is_quick else (7, 65)
    prefill = {"prompt_tokens": CHUNK_TOKENS, "answer_tokens": 1, "num_repeats": num_repeats}
    decode = {"prompt_tokens": 64, "answer_tokens": num_tokens, "num_repeats": 1}
    return [
        Load(name=f"prefill {CHUNK_TOKENS}", num_prompts=1, **prefill),
        Load(name=f"prefill 4 x {CHUNK_TOKENS}", num_prompts=4, **prefill),
        Load(name="decode 1", num_prompts=1, **decode),
        Load(name="decode 8", num_prompts=8, **decode),
    ]


def measure_layouts(model: str, device: str, *, is_quick: bool) -> list[LoadRow]:
    """The loads on every layout that the device has ranks for, by workers of each kind."""
    prefill, decode = loads(is_quick=is_quick)[:2], loads(is_quick=is_quick)[2:]
    return [
        row
        for layout in _with_a_device(LAYOUTS, device)
        for is_for_prompts, played in ((True, prefill), (False, decode))
        for row in measure_loads(
            LoadsTask(
                model=model,
                layout=layout,
                dtype="auto",
                device=device,
                loads=played,
                is_for_prompts=is_for_prompts,
            )
        )
    ]


def measure_overlap(model: str, device: str, *, is_quick: bool) -> list[LoadRow]:
    """Tensor parallelism as on one host, and as on two with and without overlap."""
    alone, *ways = [
        LoadsTask(
            model=model,
            layout=layout,
            dtype="auto",
            device=device,
            loads=loads(is_quick=is_quick)[::3],
            has_shared_memory=has_shared_memory,
            is_overlapped=is_overlapped,
            is_for_prompts=True,
        )
        for layout, has_shared_memory, is_overlapped in (
            ("1", True, None),
            ("tp=2", True, None),
            ("tp=2", False, False),
            ("tp=2", False, True),
        )
    ]
    if not _with_a_device(["tp=2"], device):
        ways = []
    return [row for task in (alone, *ways) for row in measure_loads(task)]


def measure_pipeline(folder: Path, device: str, *, is_quick: bool) -> list[PipelineRow]:
    """The bubble beside what the schedule must leave, with one rank a core at most."""
    model = str(write_dense(folder / "even-stages", num_layers=24))
    num_most = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    rows = []
    for text in PIPELINES:
        layout = ParallelLayout.parse(text)
        if layout.num_ranks > num_most:
            continue
        for num in MICRO_BATCHES:
            task = LoadsTask(
                model=model,
                layout=text,
                dtype="auto",
                device=device,
                loads=loads(is_quick=is_quick)[:1],
                num_micro_batches=num,
            )
            (row,) = measure_loads(task)
            expected = bubble_share(num, layout.pp, layout.interleave)
            rows.append(PipelineRow(text, num, row.median_ms, row.bubble_share, expected))
    return rows


def measure_sequence(folder: Path, device: str, *, is_quick: bool) -> list[LoadRow]:
    """Long prompts split along their tokens, on two layers: all layers of a model are alike."""
    model = str(write_dense(folder / "two-layers", num_layers=2))
    prompts: dict[int, list[Load]] = {}
    for num_tokens, step_tokens in PROMPTS[: 2 if is_quick else None]:
        load = Load(
            name=f"prefill {num_tokens} by {step_tokens}",
            num_prompts=1,
            prompt_tokens=num_tokens,
            answer_tokens=1,
            num_repeats=3 if num_tokens <= 8192 else 1,
        )
        prompts.setdefault(step_tokens, []).append(load)
    return [
        row
        for layout, has_shared_memory, kv_exchange in EXCHANGES
        if layout in _with_a_device([layout], device)
        for step_tokens, loads in prompts.items()
        for row in measure_loads(
            LoadsTask(
                model=model,
                layout=layout,
                dtype="auto",
                device=device,
                loads=loads,
                step_tokens=step_tokens,
                has_shared_memory=has_shared_memory,
                kv_exchange=kv_exchange,
            )
        )
    ]


def measure_experts(folder: Path, device: str, *, is_quick: bool) -> dict[str, list[LoadRow]]:
    """Prefill and decode of a mixture of experts whose router is even, and of a skewed one."""
    found = {}
    for name, skew in (("even", 0.0), ("skewed", SKEW)):
        model = str(write_experts(folder / name, skew=skew))
        prefill, _, _, decode = loads(is_quick=is_quick)
        found[name] = [
            row
            for layout in _with_a_device(EXPERT_LAYOUTS, device)
            for row in measure_loads(
                LoadsTask(
                    model=model,
                    layout=layout,
                    dtype="auto",
                    device=device,
                    loads=[prefill, decode],
                )
            )
        ]
    return found


def layouts_table(rows: Sequence[LoadRow], num_cores: int) -> str:
    """One line a load and layout, held against one rank."""
    alone = {row.load: row for row in rows if row.layout == "1"}
    lines = [
        [
            f"{load}, {row.layout}{_crowded(row.layout, num_cores)}"
            + ("" if row.has_shared_memory else " over TCP")
            + {None: "", True: ", overlapped", False: ", waiting"}[row.is_overlapped]
            + ("" if row.kv_exchange is None or row.layout == "1" else f", {row.kv_exchange}"),
            row.threads_per_rank,
            f"{row.median_ms:.1f}",
            f"{row.tokens_per_s:.0f}",
            f"{one.median_ms / row.median_ms:.2f}",
            f"{row.collective_share:.0%}",
            f"{row.bubble_share:.0%}",
        ]
        for load, one in alone.items()
        for row in rows
        if row.load == load
    ]
    head = ["load, layout", "threads", "ms", "tokens/s", "x one rank", "collectives", "bubble"]
    text = text_table(head, lines)
    if any(_crowded(row.layout, num_cores) for row in rows):
        text += f"\n* more ranks than cores ({num_cores}): they take turns"
    return text


def pipeline_table(rows: Sequence[PipelineRow]) -> str:
    """Measured beside expected."""
    lines = [
        [
            f"{row.layout}, {row.num_micro_batches} micro-batches",
            f"{row.median_ms:.1f}",
            f"{row.bubble_share:.0%}",
            f"{row.expected_share:.0%}",
        ]
        for row in rows
    ]
    return text_table(["layout", "ms", "bubble", "formula"], lines)


def experts_table(rows_by_router: dict[str, list[LoadRow]], num_cores: int) -> str:
    """Step times beside how unevenly tokens fall on experts, and on ranks."""
    lines = [
        [
            f"{router}, {row.load}, {row.layout}{_crowded(row.layout, num_cores)}",
            f"{row.median_ms:.2f}",
            f"{row.expert_imbalance:.2f}",
            f"{row.rank_imbalance:.2f}",
            f"{row.collective_share:.0%}",
        ]
        for router, rows in rows_by_router.items()
        for row in rows
    ]
    head = ["router, load, layout", "ms", "busiest expert / mean", "busiest rank / mean"]
    return text_table([*head, "collectives"], lines)


def report(outcome: Outcome) -> str:
    """Every table that was measured."""
    num_cores = outcome.num_cores
    blocks = [f"{outcome.model}, {outcome.device}, {num_cores} cores"]
    if outcome.collectives:
        num_ranks = outcome.collectives[0].num_ranks
        blocks.append(f"{num_ranks} ranks\n{collectives_table(outcome.collectives)}")
    if outcome.layouts:
        blocks.append(layouts_table(outcome.layouts, num_cores))
    if outcome.overlap:
        blocks.append(layouts_table(outcome.overlap, num_cores))
    if outcome.pipeline:
        blocks.append(pipeline_table(outcome.pipeline))
    if outcome.sequence:
        blocks.append(layouts_table(outcome.sequence, num_cores))
    if outcome.experts:
        blocks.append(experts_table(outcome.experts, num_cores))
    return "\n\n".join(blocks)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line's options; leaves the process on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    parser.add_argument("--only", action="append", choices=TABLES, help="repeat; all by default")
    parser.add_argument("--ranks", type=int, default=2, help="of the collectives; 2 by default")
    parser.add_argument("--model", default="demo", help="of the layouts: a path, or demo")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measure and print; returns the exit status."""
    options = parsed(arguments)
    tables, device, is_quick = options.only or TABLES, options.device, options.quick
    outcome = Outcome(device, len(os.sched_getaffinity(0)), options.model)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "collectives" in tables:
            outcome.collectives = measure_collectives(options.ranks, device, is_quick=is_quick)
        if "layouts" in tables:
            outcome.layouts = measure_layouts(_model(options.model), device, is_quick=is_quick)
        if "overlap" in tables:
            outcome.overlap = measure_overlap(_model(options.model), device, is_quick=is_quick)
        if "pipeline" in tables:
            outcome.pipeline = measure_pipeline(folder, device, is_quick=is_quick)
        if "sequence" in tables:
            outcome.sequence = measure_sequence(folder, device, is_quick=is_quick)
        if "experts" in tables:
            outcome.experts = measure_experts(folder, device, is_quick=is_quick)
    print(report(outcome))
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_bytes(msgspec.json.encode(asdict(outcome)))
    return 0


def _model(model: str) -> str:
    if model != "demo":
        return model
    from deploy.up import located_model  # only the demo model needs the launcher

    return str(located_model(model, os.environ))


def _with_a_device(layouts: Sequence[str], device: str) -> list[str]:
    """On CUDA each rank needs a device; ranks may share cores."""
    most = torch.cuda.device_count() if device == "cuda" else None
    ranks = {layout: ParallelLayout.parse(layout).num_ranks for layout in layouts}
    return [layout for layout in layouts if most is None or ranks[layout] <= most]


def _crowded(layout: str, num_cores: int) -> str:
    return " *" if ParallelLayout.parse(layout).num_ranks > num_cores else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
