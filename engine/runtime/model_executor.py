"""Computes step plans on a real model: forward pass, then sampling; implements PlanExecutor."""

from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from engine.runtime.allocator import keep_freed_memory
from engine.runtime.runner import StepRunner
from engine.runtime.warm_up import warm_up
from engine.sampling.history import SamplerState
from engine.sampling.sampler import SampleRow, sample
from engine.scheduling.sequence import Sequence
from engine.scheduling.step_plan import DrawnToken, StepPlan


class ModelExecutor:
    """Owns the model, the KV pool and what the sampler remembers of each sequence."""

    def __init__(
        self, runner: StepRunner, *, eos_token_ids: frozenset[int], max_num_tokens: int
    ) -> None:
        self.runner = runner
        self._eos_token_ids = eos_token_ids
        self._max_num_tokens = max_num_tokens
        self._states: dict[str, SamplerState] = {}

    def warm_up(self, num_threads: int) -> None:
        keep_freed_memory()
        warm_up(self.runner, max_num_tokens=self._max_num_tokens, num_threads=num_threads)
        self.runner.tell()
        self.runner.start_counting()

    @property
    def max_num_plans(self) -> int:
        return self.runner.max_num_plans

    def begin(self, plan: StepPlan, num_threads: int) -> None:
        self.runner.begin(plan, num_threads)

    def finish(self, drawing: Seq[Sequence]) -> list[DrawnToken]:
        logits_BV = self.runner.finish()
        if not drawing:
            if logits_BV.device.type == "cuda":  # KV is announced as computed after this
                torch.cuda.synchronize(logits_BV.device)
            return []
        rows = [
            SampleRow(self._state(sequence), sequence.num_tokens, sequence.num_output_tokens)
            for sequence in drawing
        ]
        return sample(logits_BV, rows)

    def forget(self, request_id: str) -> None:
        self._states.pop(request_id, None)

    def watch(self, on_failure: Callable[[Exception], None]) -> None:
        self.runner.watch(on_failure)

    def tell(self) -> None:
        self.runner.tell()

    def watch_steps(self, on_step: Callable[[StepPlan, int], bool]) -> None:
        self.runner.watch_steps(on_step)

    def close(self) -> None:
        self.runner.close()

    def _state(self, sequence: Sequence) -> SamplerState:
        state = self._states.get(sequence.request_id)
        if state is None:
            num_prompt = len(sequence.request.prompt_token_ids)
            state = SamplerState(
                sequence.request.sampling,
                prompt_token_ids=sequence.request.prompt_token_ids,
                output_token_ids=sequence.token_ids[num_prompt:],
                eos_token_ids=self._eos_token_ids,
            )
            self._states[sequence.request_id] = state
        return state
