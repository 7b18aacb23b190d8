"""An Engine without a model: the fake engine's tokens, and a gate that tests hold."""

import threading
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq

from engine.runtime.core_share import CoreShare
from engine.runtime.engine import Engine
from engine.scheduling.limits import EngineLimits
from engine.scheduling.scheduler import Scheduler
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import DrawnToken, StepPlan
from tests.fakes.engine import VOCAB_SIZE, next_token


class FakeExecutor:
    """Implements PlanExecutor.

    `gate` holds steps back while it is cleared, `entered` is set by every step before that, and
    `failure` is raised by the next step.
    """

    def __init__(self, max_num_plans: int = 1) -> None:
        self.max_num_plans = max_num_plans
        self.begun: deque[StepPlan] = deque()
        self.most_begun = 0
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.failure: BaseException | None = None
        self.warm_up_failure: BaseException | None = None
        self.is_closed = False
        self.thread_names: set[str] = set()
        self.forgotten: list[str] = []

    def warm_up(self, num_threads: int) -> None:
        if self.warm_up_failure is not None:
            raise self.warm_up_failure

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        self.thread_names.add(threading.current_thread().name)
        self.entered.set()
        self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.begun.append(plan)
        self.most_begun = max(self.most_begun, len(self.begun))

    def finish(self, drawing: Seq[Sequence]) -> list[DrawnToken]:
        plan = self.begun.popleft()
        assert [chunk.request_id for chunk in plan.chunks if chunk.is_drawing] == [
            sequence.request_id for sequence in drawing
        ]
        return [DrawnToken(next_token(sequence.token_ids), None) for sequence in drawing]

    def forget(self, request_id: str) -> None:
        self.forgotten.append(request_id)

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        self.fail = on_failure

    def tell(self) -> None:
        """Nobody waits."""

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        """Tells of no steps."""

    def close(self) -> None:
        self.is_closed = True


def make_engine(
    *,
    num_blocks: int = 64,
    max_num_batched_tokens: int = 64,
    max_num_plans: int = 1,
    cores: CoreShare | None = None,
) -> Engine[FakeExecutor]:
    """An engine that draws `tests.fakes.engine.expected_tokens`."""
    limits = EngineLimits(
        vocab_size=VOCAB_SIZE,
        max_context_tokens=10_000,
        num_blocks=num_blocks,
        block_size_tokens=16,
    )
    return Engine(
        Scheduler(
            limits,
            max_num_sequences=8,
            eos_token_ids=frozenset(),
            max_num_plans=max_num_plans,
        ),
        FakeExecutor(max_num_plans),
        cores or CoreShare.alone(1),
        max_num_batched_tokens=max_num_batched_tokens,
        shared_step_tokens_per_thread=max_num_batched_tokens // 4,
    )
