"""Real engines in virtual time, whose KV of a token is a hash of the tokens up to it."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty
from typing import Self

import numpy as np

from engine.errors import EngineDeadError
from engine.kv_cache.layout import KvLayout
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Command, Engine, EngineOutput
from engine.runtime.engine_thread import EngineThread
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence as EngineSequence
from engine.scheduling.step_plan import DrawnToken, StepPlan
from tests.fakes.engine import VOCAB_SIZE, next_token
from tests.fakes.kv_memory import HostMemory
from tests.fakes.sim.network import Network, Process
from tests.fakes.sim.watch import Watch

BLOCK_SIZE_TOKENS = 4
NUM_LAYERS = 2
LAYOUT = KvLayout(
    num_layers=NUM_LAYERS,
    num_kv_heads=1,
    head_dim=2,
    block_size_tokens=BLOCK_SIZE_TOKENS,
    dtype="bfloat16",
    num_parts=1,
)
"""A token's KV is four bytes in each layer: one tag."""
CORES = CoreShare.alone(1)


def tags_of(token_ids: Sequence[int]) -> list[int]:
    """The KV of each token: whoever computes it for the same tokens gets the same."""
    tags, tag = [], 1
    for token_id in token_ids:
        tag = (tag * 1_000_003 + token_id + 1) & 0xFFFFFFFF
        tags.append(tag)
    return tags


class TagExecutor:
    """Implements PlanExecutor: checks the KV that it reads, writes the KV that it computes."""

    def __init__(self, memory: HostMemory, watch: Watch, name: str, max_num_plans: int) -> None:
        self.max_num_plans = max_num_plans
        self._begun: deque[tuple[int, StepPlan]] = deque()
        self._num_begun = 0
        self._progress = memory.progress
        self.scheduler: Scheduler | None = None
        self._tags_PLC = memory.rows().view(np.uint32).reshape(-1, NUM_LAYERS, BLOCK_SIZE_TOKENS)
        self._watch = watch
        self._name = name

    def warm_up(self, num_threads: int) -> None:
        """Nothing to warm."""

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        """Computes the first layer, but its progress is a last stage's: it begins in `finish`."""
        self._num_begun += 1
        self._on_step(plan, self._num_begun)
        self._begun.append((self._num_begun, plan))
        self._compute(plan, 0)

    def finish(self, drawing: Sequence[EngineSequence]) -> list[DrawnToken]:
        step, plan = self._begun.popleft()
        self._progress.begin(step)
        self._compute(plan, 1)
        self._progress.end()
        return [DrawnToken(next_token(sequence.token_ids), None) for sequence in drawing]

    def _compute(self, plan: StepPlan, layer: int) -> None:
        assert self.scheduler is not None
        for chunk in plan.chunks:
            token_ids = self.scheduler.sequence(chunk.request_id).token_ids
            tags = [tag ^ layer for tag in tags_of(token_ids)]
            blocks = list(chunk.block_ids)
            kv = self._tags_PLC[blocks, layer].reshape(-1)
            first, end = chunk.first_position, chunk.first_position + len(chunk.token_ids)
            if kv[:first].tolist() != tags[:first]:
                self._watch.violate(
                    f"{self._name} computes {chunk.request_id} from KV that is not its own"
                )
            kv[first:end] = tags[first:end]
            self._tags_PLC[blocks, layer] = kv.reshape(-1, BLOCK_SIZE_TOKENS)

    def forget(self, request_id: str) -> None:
        """Remembers nothing."""

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        """Cannot fail."""

    def tell(self) -> None:
        self._progress.tell()

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        self._on_step = on_step

    def close(self) -> None:
        """Holds nothing."""


class SimEngine(EngineThread):
    """The real one but for its thread: its turns are timers, its answers take a moment."""

    def __init__(
        self, process: Process, memory: HostMemory, network: Network, *, num_blocks: int
    ) -> None:
        executor = TagExecutor(
            memory, network.watch, process.name, max_num_plans=network.chance.integer(1, 2)
        )
        limits = EngineLimits(
            vocab_size=VOCAB_SIZE,
            max_context_tokens=1000,
            num_blocks=num_blocks,
            block_size_tokens=BLOCK_SIZE_TOKENS,
        )
        self.scheduler = Scheduler(limits, max_num_sequences=4, eos_token_ids=frozenset())
        executor.scheduler = self.scheduler
        super().__init__(
            Engine(self.scheduler, executor, CORES, max_num_batched_tokens=8),
            unclaimed_commit_timeout_s=3.0,
        )
        self._process = process
        self._network = network
        self._chance = network.chance
        self._is_turn_due = False
        self._delivered_s = 0.0

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._engine.report_to(self._send)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._fail_all(EngineDeadError("the engine is stopped"))

    def _put(self, command: Command) -> int:
        command_id = super()._put(command)
        self._wake()
        return command_id

    def _wake(self) -> None:
        assert self._loop is not None
        if not self._is_turn_due:
            self._is_turn_due = True
            self._loop.call_later(self._chance.uniform(0.0, 0.02), self._turn)

    def _turn(self) -> None:
        self._is_turn_due = False
        if not self._process.is_alive:
            return
        try:
            while (item := self._commands.get_nowait()) is not None:
                assert isinstance(item, tuple)
                self._send(self._engine.apply(*item))
        except Empty:
            pass
        stepped = self._engine.step()
        if stepped is not None:
            self._send(stepped, step_s=self._chance.uniform(0.0, 0.02))
            self._wake()
        self._network.pulse()

    def _send(self, outputs: Sequence[EngineOutput], step_s: float = 0.0) -> None:
        assert self._loop is not None
        if outputs:
            ready_s = self._loop.time() + step_s + self._chance.uniform(0.0, 0.002)
            self._delivered_s = max(ready_s, self._delivered_s + 1e-6)
            self._loop.call_at(self._delivered_s, self._deliver, outputs)
