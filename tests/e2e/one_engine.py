"""One engine in the test's process that does both, prefill and decode: what a mesh must equal."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.config import EngineConfig
from engine.request import Request, SamplingParams, TokenLogprobs
from engine.runtime.build import ModelEngine, build_engine
from engine.runtime.commands import SequenceMode, TokenEvent
from engine.runtime.engine import Submit


@dataclass(frozen=True, slots=True)
class EngineAnswer:
    """Tokens, and the log probabilities of each if they were asked for."""

    token_ids: list[int]
    logprobs: list[TokenLogprobs]


class OneEngine:
    """Answers one prompt at a time."""

    def __init__(self, engine: ModelEngine) -> None:
        self._engine = engine

    def answer(self, prompt: Sequence[int], sampling: SamplingParams) -> EngineAnswer:
        """Step until the answer has ended."""
        request = Request(request_id="one", prompt_token_ids=tuple(prompt), sampling=sampling)
        outputs = list(self._engine.apply(0, Submit(request, SequenceMode.LOCAL)))
        while (stepped := self._engine.step()) is not None:
            outputs += stepped
        tokens = [output for output in outputs if isinstance(output, TokenEvent)]
        assert tokens[-1].finish_reason is not None, outputs[-1]
        return EngineAnswer(
            [token.token_id for token in tokens],
            [token.logprobs for token in tokens if token.logprobs is not None],
        )


@contextmanager
def one_engine(model: Path, dtype: str) -> Iterator[OneEngine]:
    """Load `model`; its prefix cache is off, so that every prompt is computed whole."""
    config = EngineConfig(
        dtype=dtype, device="cpu", kv_pool_bytes=1 << 29, num_threads=2, has_prefix_cache=False
    )
    engine = build_engine(model, config)
    engine.prepare()
    try:
        yield OneEngine(engine)
    finally:
        engine.close()
