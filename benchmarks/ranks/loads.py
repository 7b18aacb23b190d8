"""A worker of several ranks under load: step times, and where the time of its ranks goes.

The worker is the real one (scheduler, plans to the other ranks, sampling) without a network.
"""

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.ranks.processes import device_of_rank, run_on_ranks, take_own_cores
from engine.config import CollectivesConfig, EngineConfig
from engine.parallel import ParallelLayout, RankEnvironment, join_group
from engine.parallel.kv_exchange import KvExchange
from engine.request import Request, SamplingParams
from engine.runtime.build import ModelEngine, build_engine, build_follower
from engine.runtime.commands import ErrorEvent, SequenceMode
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Submit
from engine.runtime.membership import Membership, connect_ranks
from engine.runtime.rank_message import ExpertTokens, RankTimes
from mesh.metrics import imbalance_of

CHUNK_TOKENS = 512
"""Of one step, where nothing else is said."""
_MAX_SEQUENCES = 16
_MAX_CONTEXT_TOKENS = 40_000
_REPORT_TIMEOUT_S = 5.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts that are submitted at once, and the tokens that are drawn for each."""

    name: str
    num_prompts: int
    prompt_tokens: int
    answer_tokens: int
    """1: prefill is timed. More: the steps after every prompt's first token are timed."""
    num_repeats: int


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadRow:
    """One load on one layout."""

    layout: str
    threads_per_rank: int
    load: str
    has_shared_memory: bool
    is_overlapped: bool | None
    kv_exchange: str | None
    """None: as the worker chose."""
    num_micro_batches: int | None
    """None: as the worker chose."""
    median_ms: float
    """Of all prompts' prefill, or from one token to the next."""
    tokens_per_s: float
    collective_share: float
    """Of the ranks' step time, in collectives within a stage, waiting for slower ranks included."""
    bubble_share: float
    """Of the time that the load took, summed over ranks: waiting for other stages."""
    expert_imbalance: float
    """Tokens of the busiest expert over the mean, all layers together; 1 without experts."""
    rank_imbalance: float
    """The same for the ranks that experts are spread over."""


class LoadsTask(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Several loads, one after the other, on one layout."""

    model: str
    layout: str
    dtype: str
    device: str
    loads: list[Load]
    num_micro_batches: int | None = None
    step_tokens: int = CHUNK_TOKENS
    """At most, in one step."""
    has_shared_memory: bool = True
    """False: as ranks of several hosts."""
    is_overlapped: bool | None = None
    """Whether a rank computes while sums over the tensor axis travel; None: as the group finds."""
    kv_exchange: KvExchange | None = None
    """None: as the worker chooses."""
    is_for_prompts: bool = False
    """Stages are cut as in a prefill worker."""

    def run(self, place: RankEnvironment) -> list[LoadRow]:
        layout = ParallelLayout.parse(self.layout)
        device = device_of_rank(self.device, place.local_rank)
        num_threads = take_own_cores(place.rank, layout.num_ranks)
        config = EngineConfig(
            dtype=self.dtype,
            device=self.device,
            parallel=layout,
            has_prefix_cache=False,
            kv_pool_bytes=512 << 20,
            max_context_tokens=_context_tokens(self.loads),
            max_num_batched_tokens=self.step_tokens,
            max_num_sequences=_MAX_SEQUENCES,
            shared_step_tokens_per_thread=self.step_tokens,
            num_micro_batches=self.num_micro_batches,
            num_threads=num_threads,
        )
        cores, path = CoreShare.alone(num_threads), Path(self.model)
        collectives = CollectivesConfig(has_shared_memory=self.has_shared_memory)
        with join_group(layout, place, config=collectives, device=device) as group:
            sums = group.axes.tp.collectives
            if sums is not None and self.is_overlapped is not None:
                sums.is_in_background = self.is_overlapped
            group.axes = replace(group.axes, kv_exchange=self.kv_exchange)
            membership: Membership | None = None
            if layout.num_ranks > 1:
                membership = connect_ranks(group, collectives, host=place.master_address)
            if membership is not None and membership.leader is not None:
                follower = build_follower(
                    path,
                    config,
                    membership=membership,
                    cores=cores,
                    is_for_prompts=self.is_for_prompts,
                )
                try:
                    follower.run()
                finally:
                    follower.close()
                return []
            engine = build_engine(
                path,
                config,
                membership=membership,
                cores=cores,
                is_for_prompts=self.is_for_prompts,
            )
            engine.watch(lambda error: group.abort(str(error)))
            try:
                engine.prepare()
                return [self._row(engine, load, num_threads) for load in self.loads]
            finally:
                engine.close()

    def _row(self, engine: ModelEngine, load: Load, num_threads: int) -> LoadRow:
        if load.num_repeats > 1:  # else it is long enough to be its own warm-up
            _play(engine, load, seed=0)
        before, counted = _settled_times(engine), engine.runner.expert_tokens
        plays = [_play(engine, load, seed=1 + index) for index in range(load.num_repeats)]
        after = _settled_times(engine)
        median_s = statistics.median(play.timed_s for play in plays)
        step_s = _grown(before, after, "step_s")
        busy_s = _grown(before, after, "busy_s")
        waited_s = step_s - busy_s
        collective_s = _grown(before, after, "communication_s") - waited_s
        num_ranks = max(len(after), 1)
        total_s = num_ranks * sum(play.total_s for play in plays)
        layout = ParallelLayout.parse(self.layout)
        tokens = load.num_prompts * (load.prompt_tokens if load.answer_tokens == 1 else 1)
        return LoadRow(
            layout=self.layout,
            threads_per_rank=num_threads,
            load=load.name,
            has_shared_memory=self.has_shared_memory,
            is_overlapped=self.is_overlapped,
            kv_exchange=None if self.kv_exchange is None else self.kv_exchange.value,
            num_micro_batches=self.num_micro_batches,
            median_ms=median_s * 1e3,
            tokens_per_s=tokens / median_s,
            collective_share=max(0.0, collective_s / step_s) if step_s else 0.0,
            bubble_share=1 - busy_s / total_s if layout.pp > 1 else 0.0,
            **imbalances(counted, engine.runner.expert_tokens),
        )


@dataclass(frozen=True, slots=True)
class _Play:
    total_s: float
    timed_s: float


def measure_loads(task: LoadsTask) -> list[LoadRow]:
    """Start the layout's ranks and play the loads on them."""
    return run_on_ranks(ParallelLayout.parse(task.layout), task, list[LoadRow])


def _play(engine: ModelEngine, load: Load, *, seed: int) -> _Play:
    """Submit all prompts, step until all are answered."""
    draw = random.Random(seed)
    vocab_size = engine.limits.vocab_size
    for index in range(load.num_prompts):
        prompt = tuple(draw.randrange(vocab_size) for _ in range(load.prompt_tokens))
        sampling = SamplingParams(temperature=0, max_tokens=load.answer_tokens, ignore_eos=True)
        request = Request(request_id=f"{seed}-{index}", prompt_token_ids=prompt, sampling=sampling)
        outputs = engine.apply(0, Submit(request, SequenceMode.LOCAL))
        assert not any(isinstance(output, ErrorEvent) for output in outputs), outputs
    start_s = prefilled_s = time.perf_counter()
    num_tokens = 0
    while (stepped := engine.step()) is not None:
        num_tokens += len(stepped)
        if num_tokens <= load.num_prompts:
            prefilled_s = time.perf_counter()
    end_s = time.perf_counter()
    assert num_tokens == load.num_prompts * load.answer_tokens, f"{num_tokens} tokens came"
    if load.answer_tokens == 1:
        return _Play(end_s - start_s, end_s - start_s)
    return _Play(end_s - start_s, (end_s - prefilled_s) / (load.answer_tokens - 1))


def _settled_times(engine: ModelEngine) -> list[RankTimes]:
    """Of all ranks, once the others have said how long the last step took them."""
    end_s = time.monotonic() + _REPORT_TIMEOUT_S
    while True:
        found = engine.rank_times
        if len({times.num_steps for times in found}) <= 1:
            return found
        assert time.monotonic() < end_s, f"ranks do not tell their times: {found}"
        time.sleep(0.005)


def _grown(before: Sequence[RankTimes], after: Sequence[RankTimes], name: str) -> float:
    pairs = zip(before, after, strict=True)
    return float(sum(getattr(new, name) - getattr(old, name) for old, new in pairs))


def imbalances(before: Sequence[ExpertTokens], after: Sequence[ExpertTokens]) -> dict[str, float]:
    """Of experts, and of ranks; where ranks share experts one of them counts."""
    new_by_rank = [
        np.sum([np.subtract(new[layer], old[layer]) for layer in new], axis=0)
        for old, new in zip(before, after, strict=True)
        if new
    ]
    ranks = [int(counts.sum()) for counts in new_by_rank if counts.any()]
    experts = np.sum(new_by_rank, axis=0).tolist() if new_by_rank else [1]
    return {"expert_imbalance": imbalance_of(experts), "rank_imbalance": imbalance_of(ranks or [1])}


def _context_tokens(loads: Sequence[Load]) -> int:
    longest = max(load.prompt_tokens + load.answer_tokens for load in loads)
    assert longest <= _MAX_CONTEXT_TOKENS, f"a load of {longest} tokens"
    return longest
