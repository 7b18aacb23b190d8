"""A worker's engine over several ranks, as the workers put it together, with its real thread."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.config import EngineConfig
from engine.parallel import CollectivesConfig, RankGroup
from engine.request import Request, SamplingParams
from engine.runtime.build import ModelEngine, build_engine, build_follower
from engine.runtime.commands import EngineEvent, ErrorEvent, SequenceMode, TokenEvent
from engine.runtime.core_share import CoreShare
from engine.runtime.engine_thread import EngineThread
from engine.runtime.membership import Membership, connect_ranks

ENGINE = {
    "dtype": "float32",
    "device": "cpu",
    "kv_pool_bytes": 1 << 22,
    "max_num_sequences": 16,
    "max_num_batched_tokens": 64,
    "num_threads": 1,
}


class Answers:
    """An EventSink that keeps the tokens of each request until all are answered."""

    def __init__(self, num_requests: int) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.errors: list[BaseException] = []
        self.done = asyncio.Event()
        self._num_open = num_requests

    def put(self, events: Sequence[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, TokenEvent):
                self.tokens.setdefault(event.request_id, []).append(event.token_id)
            is_error = isinstance(event, ErrorEvent)
            if isinstance(event, ErrorEvent):
                self.errors.append(event.error)
            if is_error or (isinstance(event, TokenEvent) and event.finish_reason is not None):
                self._num_open -= 1
                if self._num_open == 0:
                    self.done.set()


def request_of(index: int, prompt: Sequence[int], num_tokens: int, **sampling: Any) -> Request:
    params = SamplingParams(
        max_tokens=num_tokens, ignore_eos=True, **{"temperature": 0.0, **sampling}
    )
    return Request(request_id=f"r{index}", prompt_token_ids=tuple(prompt), sampling=params)


def cores_of_test() -> CoreShare:
    return CoreShare.alone(1)


def member(group: RankGroup, config: CollectivesConfig | None = None) -> Membership:
    return connect_ranks(group, config or CollectivesConfig(), host="127.0.0.1")


def follow(membership: Membership, path: Path, settings: dict[str, Any]) -> None:
    """What every rank but 0 does."""
    config = EngineConfig(**{**ENGINE, **settings})
    follower = build_follower(path, config, membership=membership, cores=cores_of_test())
    try:
        follower.run()
    finally:
        follower.close()


def lead(membership: Membership | None, path: Path, settings: dict[str, Any]) -> ModelEngine:
    """Rank 0's engine."""
    config = EngineConfig(**{**ENGINE, **settings})
    return build_engine(path, config, membership=membership, cores=cores_of_test())


async def answer_all(
    engine: ModelEngine, prompts: Sequence[Sequence[int]], num_tokens: int, **sampling: Any
) -> Answers:
    """Submit all prompts at once to the engine's thread, and wait."""
    async with EngineThread(engine) as thread:
        answers = Answers(len(prompts))
        for index, prompt in enumerate(prompts):
            request = request_of(index, prompt, num_tokens, **sampling)
            thread.submit(request, SequenceMode.LOCAL, answers)
        await answers.done.wait()
    return answers
