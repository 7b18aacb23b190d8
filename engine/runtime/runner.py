"""Runs a step plan on the model: index tensors, forward pass, logits of the drawing chunks.

Shape suffixes: T tokens of this step, B sequences, W blocks per sequence, D model dim,
V vocabulary.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from engine.kv_cache.batch import KeySpans, SequenceSplit, StepBatch
from engine.kv_cache.pool import KvPool
from engine.models.causal_lm import CausalLM
from engine.parallel.axes import AxisGroup
from engine.parallel.kv_exchange import KvExchange, kv_exchange_for
from engine.runtime.kv_news import is_news, layers_told
from engine.runtime.rank_message import ExpertTokens
from engine.scheduling.micro_batch import cut_into_micro_batches, pass_order
from engine.scheduling.sequence_split import mean_context_tokens, ring_spans, sequence_shares
from engine.scheduling.step_plan import ScheduledChunk, StepPlan

_Table = np.ndarray[tuple[int, int], np.dtype[np.int32]]
_Indices = np.ndarray[tuple[int], np.dtype[np.int64]]
_WIDTH_STEP = 8  # block tables grow by so many columns, so that their shapes repeat


class StepRunner(Protocol):
    """Computes plans: `ModelRunner` on one rank, `GroupRunner` on rank 0 of several."""

    @property
    def model(self) -> CausalLM:
        """This rank's."""

    @property
    def pool(self) -> KvPool:
        """This rank's."""

    @property
    def num_data_shards(self) -> int:
        """Block ids of plans count over so many pools."""

    @property
    def max_num_plans(self) -> int:
        """How many may have begun and not be finished."""

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        """Start on a plan; may compute this rank's part of it before it returns."""

    def finish(self) -> torch.Tensor:
        """The earliest plan that has begun: logits_BV, float32, one row a drawing chunk."""

    @property
    def expert_tokens(self) -> list[ExpertTokens]:
        """By rank, as far as is known; any thread may ask."""

    def tell(self) -> None:
        """As `PlanExecutor.tell`."""

    def start_counting(self) -> None:
        """The warm-up is over: expert tokens are counted from here on."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Have `on_failure` called, on any thread, if it becomes unable to go on between steps."""

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        """As `PlanExecutor.watch_steps`."""

    def close(self) -> None:
        """Free what it holds."""


class ModelRunner:
    """Owns the model and the KV pool of one rank; one plan at a time, on one thread.

    Every rank of a worker runs the same plans in the same order. A stage of a pipeline works as
    soon as the stage before has sent, so that stages work on different plans at the same time.
    """

    num_data_shards = 1
    max_num_plans = 1

    def __init__(
        self,
        model: CausalLM,
        pool: KvPool,
        device: torch.device,
        pipeline: AxisGroup | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self._device = device
        self._pipeline = pipeline or AxisGroup()
        self._begun: torch.Tensor | None = None
        self._num_steps = 0
        self._num_cores = len(os.sched_getaffinity(os.getpid()))
        self._on_step: Callable[[StepPlan, int], bool] | None = None

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        """Compute a plan on a worker of one rank."""
        step, is_watched = self.announce(plan)
        self._begun = self.run((plan,), 1, num_threads, step, is_watched=is_watched)

    def finish(self) -> torch.Tensor:
        assert self._begun is not None, "nothing has begun"
        logits_BV, self._begun = self._begun, None
        return logits_BV

    def announce(self, plan: StepPlan) -> tuple[int, bool]:
        """The next step's number, and whether somebody waits for its layers; on rank 0."""
        self._num_steps += 1
        is_watched = (
            self._on_step is not None
            and self._is_news(plan.num_tokens)
            and self._on_step(plan, self._num_steps)
        )
        return self._num_steps, is_watched

    @torch.inference_mode()
    def run(
        self,
        plans: Sequence[StepPlan],
        num_passes: int,
        num_threads: int,
        step: int,
        *,
        is_watched: bool,
    ) -> torch.Tensor:
        """Compute micro-batches on this stage; returns logits_BV, float32, a row a drawing chunk.

        On CUDA the result is still being computed when this returns. Stages before the last one
        return no rows, and neither do ranks of the sequence axis after the first. When one of
        that axis' ranks returns, all have written their KV; where there are rows, it is told of
        only by `tell`, since sending would compete with drawing the tokens.

        Args:
            plans: at most `num_passes`, in order.
            num_passes: micro-batches of the data shard with the most. While this one has none, it
                takes part in the experts' exchange. Sends and receives come in `pass_order`.
            num_threads: see `begin`.
            step: its number in the pool's `KvProgress`.
            is_watched: the progress hears of layers as the last micro-batch writes them, if that is
                worth it, not of the end only.
        """
        pipeline, sequence, num_ranges = self._pipeline, self.model.sequence, self.model.num_ranges
        progress = self.pool.progress
        progress.begin(step)
        num_tokens = sum(plan.num_tokens for plan in plans)
        is_told = is_watched and num_tokens > 0
        told = layers_told(
            plans,
            progress.num_layers,
            self.pool.layout.bytes_per_token,
            has_spare_core=num_threads < self._num_cores,
        )
        batches: dict[int, tuple[StepPlan, StepBatch]] = {}
        logits: list[torch.Tensor] = []
        for index, range_index in pass_order(num_passes, pipeline.size, num_ranges):
            if index >= len(plans):
                self.model.serve(self._device, range_index)
                continue
            if range_index == 0:
                batches[index] = self._batch(plans[index], num_threads)
            plan, batch = batches[index]
            is_first = self.model.is_first_stage and range_index == 0
            is_last = self.model.is_last_stage and range_index == num_ranges - 1
            residual_TD = None if is_first else self._received(len(batch.token_T))
            hidden_TD = self.model.forward(
                batch,
                self.pool,
                residual_TD,
                range_index,
                on_layer=self._tell if is_told and index == len(plans) - 1 else None,
                told=told,
            )
            if not is_last:
                pipeline.send(hidden_TD, (pipeline.rank + 1) % pipeline.size)
            elif sequence.rank == 0 and any(chunk.is_drawing for chunk in plan.chunks):
                logits.append(self._logits(hidden_TD, plan, batch))
            if range_index == num_ranges - 1:
                del batches[index]
        progress.end()  # on CUDA it will; nobody asks, see `_is_news`
        if not logits:
            progress.tell()
        sequence.barrier()
        if not logits:
            return torch.empty((0, 0), dtype=torch.float32, device=self._device)
        return logits[0] if len(logits) == 1 else torch.cat(logits)

    def _is_news(self, num_tokens: int) -> bool:
        """On CUDA nothing is: none of it is known to be written there before the step has ended."""
        is_known = self._device.type == "cpu"
        return is_known and is_news(num_tokens, self.pool.layout.bytes_per_token)

    def _tell(self, place: int) -> None:
        self.pool.progress.reach(place + 1)

    def _batch(self, plan: StepPlan, num_threads: int) -> tuple[StepPlan, StepBatch]:
        """This rank's share of a plan, packed."""
        block_size, sequence = self.pool.layout.block_size_tokens, self.model.sequence
        shares = sequence_shares(plan, sequence.size)
        plan = plan if shares is None else shares[sequence.rank]
        batch = step_batch(plan, block_size, self._device, num_threads)
        if shares is not None:
            batch = replace(batch, split=self._split(shares))
        elif (num_parts := self.model.num_parts(plan.num_tokens)) > 1:
            parts = cut_into_micro_batches(plan, num_parts)
            batches = (step_batch(part, block_size, self._device, num_threads) for part in parts)
            batch = replace(batch, parts=tuple(batches))
        return plan, batch

    def _split(self, shares: tuple[StepPlan, ...]) -> SequenceSplit:
        ring: tuple[KeySpans, ...] | None = None
        if self._kv_exchange(shares) is KvExchange.RING:
            ring = tuple(map(KeySpans.of, ring_spans(shares, self.model.sequence.rank)))
        block_size = self.pool.layout.block_size_tokens
        slots = [
            _places(share.chunks, _block_table(share.chunks), block_size)[1] for share in shares
        ]
        return SequenceSplit(
            num_tokens=tuple(share.num_tokens for share in shares),
            slot_N=_to_device(np.concatenate(slots), self._device),
            ring=ring,
        )

    def _kv_exchange(self, shares: tuple[StepPlan, ...]) -> KvExchange:
        if self.model.kv_exchange is not None:
            return self.model.kv_exchange
        layout, sequence = self.pool.layout, self.model.sequence
        assert sequence.collectives is not None, "a split step has ranks to talk to"
        num_tokens = sum(share.num_tokens for share in shares)
        return kv_exchange_for(
            sequence.collectives.name,
            part_bytes=num_tokens * layout.bytes_per_token // layout.num_layers // sequence.size,
            context_tokens=mean_context_tokens(shares),
        )

    def _logits(self, hidden_TD: torch.Tensor, plan: StepPlan, batch: StepBatch) -> torch.Tensor:
        ends = accumulate(batch.query_lens)
        rows = [end - 1 for end, chunk in zip(ends, plan.chunks, strict=True) if chunk.is_drawing]
        if len(rows) < hidden_TD.shape[0]:
            hidden_TD = hidden_TD[_to_device(np.array(rows, dtype=np.int64), self._device)]
        return self.model.logits(hidden_TD)

    def _received(self, num_tokens: int) -> torch.Tensor:
        """The residual from the stage before, or from the last one for the next range."""
        residual_TD = torch.empty(
            (num_tokens, self.model.config.hidden_size),
            dtype=self.model.dtype,
            device=self._device,
        )
        return self._pipeline.receive(residual_TD, (self._pipeline.rank - 1) % self._pipeline.size)

    @property
    def expert_tokens(self) -> list[ExpertTokens]:
        """Of this rank alone; any thread may ask."""
        loads = self.model.expert_loads
        return [{layer: load.by_expert() for layer, load in loads.items()}]

    def start_counting(self) -> None:
        for load in self.model.expert_loads.values():
            load.reset()

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Nothing happens between steps."""

    def tell(self) -> None:
        self.pool.progress.tell()

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        self._on_step = on_step

    def close(self) -> None:
        self.pool.close()


def step_batch(
    plan: StepPlan, block_size_tokens: int, device: torch.device, num_threads: int
) -> StepBatch:
    """Pack a plan's chunks; numpy on the host, then one asynchronous copy for each tensor."""
    chunks = plan.chunks
    query_lens = tuple(len(chunk.token_ids) for chunk in chunks)
    context_lens = tuple(
        chunk.first_position + num_new for chunk, num_new in zip(chunks, query_lens, strict=True)
    )
    table_BW = _block_table(chunks)
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.token_ids
    query_start_B1 = np.array([0, *accumulate(query_lens)], dtype=np.int64)
    position_T, slot_T = _places(chunks, table_BW, block_size_tokens)
    return StepBatch(
        token_T=_to_device(np.array(tokens, dtype=np.int64), device),
        position_T=_to_device(position_T, device),
        slot_T=_to_device(slot_T, device),
        block_table_BW=_to_device(table_BW, device),
        query_start_B1=_to_device(query_start_B1.astype(np.int32), device),
        context_len_B=_to_device(np.array(context_lens, dtype=np.int32), device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_threads=num_threads,
        prompt_lens=tuple(chunk.num_prompt_tokens for chunk in chunks),
    )


def _places(
    chunks: tuple[ScheduledChunk, ...], table_BW: _Table, block_size_tokens: int
) -> tuple[_Indices, _Indices]:
    """position_T and slot_T of the chunks' tokens."""
    lens_B = np.array([len(chunk.token_ids) for chunk in chunks], dtype=np.int64)
    before_B = np.cumsum(lens_B) - lens_B
    first_B = np.array([chunk.first_position for chunk in chunks], dtype=np.int64)
    row_T = np.repeat(np.arange(len(chunks)), lens_B)
    position_T = np.arange(len(row_T)) + (first_B - before_B)[row_T]
    block_T, offset_T = np.divmod(position_T, block_size_tokens)
    return position_T, table_BW[row_T, block_T].astype(np.int64) * block_size_tokens + offset_T


def _block_table(
    chunks: tuple[ScheduledChunk, ...],
) -> _Table:
    longest = max(len(chunk.block_ids) for chunk in chunks)
    width = -(-longest // _WIDTH_STEP) * _WIDTH_STEP
    table_BW = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        table_BW[row, : len(chunk.block_ids)] = chunk.block_ids
    return table_BW


def _to_device(
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]], device: torch.device
) -> torch.Tensor:
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
