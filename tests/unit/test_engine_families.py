"""Whole engines of families whose KV differs from Llama's: handover, prefix cache and batches."""

import pytest

from engine.config import EngineConfig
from engine.runtime.build import ModelEngine, build_engine
from tests.checkpoints import tiny_checkpoint
from tests.unit.test_engine import hand_over, make_prompts, make_request, run
from tests.unit.test_model_parity import CASES

PROMPTS = make_prompts([1, 16, 33, 100, 150], seed=3)
FAMILIES = {
    "gemma3": "auto",
    "phi3-longrope-part-rotated": "auto",
    "olmo2": "auto",
    "mixtral": "auto",
    "deepseek-v3": "auto",
    "gpt-oss": "auto",
    "llama": "int8",
    "deepseek-v2": "fp8",
}
"""With what their pools hold."""


@pytest.fixture(params=FAMILIES)
def make_engine(request, tmp_path):
    """Build engines of one family that are closed after the test."""
    case = CASES[request.param]
    checkpoint = tiny_checkpoint(tmp_path, case.family, **case.overrides)
    engines: list[ModelEngine] = []

    def make(**changes) -> ModelEngine:
        config = EngineConfig(
            dtype="float32",
            device="cpu",
            kv_pool_bytes=1 << 24,
            max_num_sequences=8,
            max_context_tokens=400,
            num_threads=1,
            kv_dtype=FAMILIES[request.param],
            **changes,
        )
        engines.append(build_engine(checkpoint, config))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def test_handover_batch_and_prefix_hit_draw_the_tokens_of_one_engine(make_engine) -> None:
    plain = make_engine(has_prefix_cache=False, max_num_batched_tokens=512)
    alone = [run(plain, [make_request("a", prompt)])["a"] for prompt in PROMPTS]

    chunked = make_engine(max_num_batched_tokens=48)
    requests = [make_request(str(index), prompt) for index, prompt in enumerate(PROMPTS)]
    together = run(chunked, requests)
    assert [together[request.request_id] for request in requests] == alone
    assert run(chunked, [make_request("again", PROMPTS[-1])])["again"] == alone[-1]
    assert chunked.stats.num_prefix_hit_tokens >= 144

    prefill, decode = make_engine(), make_engine()
    for request, answer in zip(requests, alone, strict=True):
        assert hand_over(prefill, decode, request) == answer
    assert decode.stats.num_prefill_tokens == 0
