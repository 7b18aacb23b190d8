"""A whole engine on small random checkpoints: however the work is cut, the tokens are the same."""

import os
import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.errors import CheckpointError
from engine.kv_cache.pool_plan import KvPoolTooSmallError
from engine.request import FinishReason, Request, SamplingParams
from engine.runtime import kv_news
from engine.runtime.build import ModelEngine, build_engine
from engine.runtime.commands import (
    ErrorEvent,
    KvComputedEvent,
    Reservation,
    SequenceMode,
    TokenEvent,
)
from engine.runtime.core_share import CoreShare
from engine.runtime.engine import CommitReservation, PrefixEnded, Reply, Reserve, Submit
from engine.scheduling.block_hash import block_hashes
from tests.checkpoints import tiny_checkpoint

LOCAL, PREFILL, DECODE = SequenceMode.LOCAL, SequenceMode.PREFILL, SequenceMode.DECODE


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def make_engine(checkpoint):
    """Build engines that are closed after the test."""
    engines: list[ModelEngine] = []

    def make(**changes) -> ModelEngine:
        defaults = {
            "dtype": "float32",
            "device": "cpu",
            "kv_pool_bytes": 1 << 24,
            "max_num_sequences": 16,
            "num_threads": 1,
        }
        engine = build_engine(checkpoint, EngineConfig(**{**defaults, **changes}))
        engine.prepare()
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def make_prompts(lengths, seed=0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(3, 384) for _ in range(length)) for length in lengths]


def make_request(request_id, prompt, *, max_tokens=12, **sampling) -> Request:
    params = SamplingParams(
        max_tokens=max_tokens, ignore_eos=True, **{"temperature": 0.0, **sampling}
    )
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=params)


def run(engine: ModelEngine, requests, mode=LOCAL) -> dict[str, list[int]]:
    """Submit all at once, step until nothing runs."""
    tokens: dict[str, list[int]] = {}
    for request in requests:
        engine.limits.check_request(request, mode)
        collect(engine.apply(0, Submit(request, mode)), tokens)
    while (outputs := engine.step()) is not None:
        collect(outputs, tokens)
    engine.scheduler.check_conservation()
    return tokens


def collect(outputs, tokens) -> None:
    for output in outputs:
        if isinstance(output, ErrorEvent):
            raise output.error
        if isinstance(output, TokenEvent):
            tokens.setdefault(output.request_id, []).append(output.token_id)


PROMPTS = make_prompts([1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 128, 150, 200, 300])


@pytest.fixture(scope="module")
def alone(checkpoint):
    """Each prompt's greedy answer, computed alone, whole, without a prefix cache."""
    config = EngineConfig(
        dtype="float32",
        device="cpu",
        kv_pool_bytes=1 << 24,
        num_threads=1,
        has_prefix_cache=False,
    )
    engine = build_engine(checkpoint, config)
    answers = [run(engine, [make_request("a", prompt)])["a"] for prompt in PROMPTS]
    engine.close()
    return answers


def test_greedy_tokens_equal_those_of_transformers(checkpoint, alone):
    from transformers import AutoModelForCausalLM

    reference: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, alone, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = reference.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
        assert output[0, len(prompt) :].tolist() == answer


@pytest.mark.parametrize("has_prefix_cache", [True, False])
def test_batch_of_16_equals_each_alone(make_engine, alone, has_prefix_cache):
    engine = make_engine(has_prefix_cache=has_prefix_cache)
    tokens = run(engine, [make_request(str(i), prompt) for i, prompt in enumerate(PROMPTS)])
    assert [tokens[str(i)] for i in range(16)] == alone


def test_chunked_prefill_equals_whole_prefill(make_engine, alone):
    engine = make_engine(max_num_batched_tokens=48, max_num_sequences=4)
    tokens = run(engine, [make_request(str(i), prompt) for i, prompt in enumerate(PROMPTS)])
    assert [tokens[str(i)] for i in range(16)] == alone
    assert engine.stats.num_prefill_tokens == sum(map(len, PROMPTS))


def test_prefix_hit_draws_the_same_tokens(make_engine, alone):
    engine = make_engine()
    run(engine, [make_request("first", PROMPTS[-1])])
    again = run(engine, [make_request("again", PROMPTS[-1])])
    assert engine.stats.num_prefix_hit_tokens == 288
    assert again["again"] == alone[-1]


def test_preemption_draws_the_same_tokens(make_engine, alone):
    engine = make_engine(
        kv_pool_bytes=24 * 16 * 3 * 2 * 2 * 16 * 4,  # 24 blocks of 16 tokens
        max_context_tokens=350,
    )
    assert engine.stats.num_blocks == 24
    picked = [5, 6, 7, 8, 9, 10]
    requests = [make_request(str(i), PROMPTS[i], max_tokens=40) for i in picked]
    tokens = run(engine, requests)
    assert engine.stats.num_preemptions > 0
    for i in picked:
        assert tokens[str(i)][:12] == alone[i]
    assert engine.stats.num_free_blocks == 24


SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 7, "repetition_penalty": 1.1}


def hand_over(prefill: ModelEngine, decode: ModelEngine, request: Request) -> list[int]:
    """Join two engines as kv_transfer does: reserve, copy blocks, commit."""
    request_id, prompt = request.request_id, request.prompt_token_ids
    first = run(prefill, [request], PREFILL)[request_id]
    held = prefill.scheduler.sequence(request_id).block_ids
    salt = prefill.model_config.rope_salt(len(prompt))
    hashes = tuple(block_hashes(prompt, 16, salt=salt))
    outputs = decode.apply(5, Reserve(request_id, len(prompt), hashes))
    (reply,) = outputs
    assert isinstance(reply, Reply)
    reservation = reply.result
    assert isinstance(reservation, Reservation)
    skip = reservation.num_cached_tokens // 16
    if held[skip:]:
        blocks = prefill.kv_pool.blocks_PLJGCA[list(held[skip:])]
        decode.kv_pool.blocks_PLJGCA[list(reservation.block_ids[skip:])] = blocks
    tokens: dict[str, list[int]] = {}
    collect(decode.apply(6, CommitReservation(request_id, first[0])), tokens)
    rest = run(decode, [request], DECODE)
    prefill.scheduler.release(request_id)
    return [*first, *rest.get(request_id, [])]


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_decode_engines_joined_equal_one_engine(make_engine, dtype, sampling):
    one, prefill, decode = (make_engine(dtype=dtype) for _ in range(3))
    for index, prompt in enumerate(PROMPTS):
        request = make_request(str(index), prompt, **sampling)
        assert hand_over(prefill, decode, request) == run(one, [request])[str(index)]
    assert decode.stats.num_prefill_tokens == 0
    assert decode.stats.num_decode_tokens == 11 * len(PROMPTS)


def test_reservation_with_a_cached_prefix_needs_only_the_rest(make_engine, alone):
    prefill, decode = make_engine(), make_engine()
    assert hand_over(prefill, decode, make_request("a", PROMPTS[-1])) == alone[-1]
    assert hand_over(prefill, decode, make_request("b", PROMPTS[-1])) == alone[-1]
    assert decode.stats.num_prefix_hit_tokens == 288
    assert decode.stats.num_prefill_tokens == 0


def test_migrated_sequence_goes_on_with_the_same_tokens(make_engine):
    engine = make_engine()
    whole = make_request("whole", PROMPTS[9], max_tokens=20, **SAMPLED)
    answer = run(engine, [whole])["whole"]
    rest = Request(
        request_id="rest",
        prompt_token_ids=whole.prompt_token_ids,
        output_token_ids=tuple(answer[:8]),
        sampling=whole.sampling,
    )
    assert run(make_engine(), [rest])["rest"] == answer[8:]


def test_sampled_tokens_do_not_depend_on_the_batch(make_engine):
    engine = make_engine(has_prefix_cache=False)
    requests = [
        make_request(str(i), prompt, temperature=1.0, seed=i, top_p=0.9 if i % 2 else 1.0)
        for i, prompt in enumerate(PROMPTS)
    ]
    together = run(engine, requests)
    for index, request in enumerate(requests):
        assert run(engine, [request])[str(index)] == together[str(index)]


def test_context_end_is_a_length_finish(make_engine):
    engine = make_engine(max_context_tokens=120)
    request = make_request("a", PROMPTS[11], max_tokens=20)
    engine.apply(0, Submit(request, LOCAL))
    outputs = []
    while (stepped := engine.step()) is not None:
        outputs += [output for output in stepped if not isinstance(output, PrefixEnded)]
    last = outputs[-1]
    assert isinstance(last, TokenEvent)
    assert last.finish_reason is FinishReason.LENGTH
    assert len(outputs) == 20


def test_pool_too_small_for_one_context_names_what_to_change(checkpoint):
    config = EngineConfig(dtype="float32", device="cpu", kv_pool_bytes=1 << 16)
    with pytest.raises(KvPoolTooSmallError, match="kv_pool_bytes"):
        build_engine(checkpoint, config)


def test_context_above_the_models_is_refused(checkpoint):
    with pytest.raises(ValueError, match="max_context_tokens"):
        build_engine(checkpoint, EngineConfig(device="cpu", max_context_tokens=100_000))


def test_missing_model_is_a_checkpoint_error(tmp_path):
    with pytest.raises(CheckpointError):
        build_engine(tmp_path / "nothing", EngineConfig(device="cpu"), cores=CoreShare([0]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_engine_draws_the_same_tokens_as_the_cpu(make_engine, alone):
    engine = make_engine(device="cuda", kv_pool_bytes=1 << 24)
    tokens = run(engine, [make_request(str(i), prompt) for i, prompt in enumerate(PROMPTS)])
    assert [tokens[str(i)] for i in range(16)] == alone


@pytest.mark.parametrize(
    ("num_cores", "news"), [(2, [1, 2, 3]), (1, [2, 3])], ids=["spare-core", "no-spare-core"]
)
def test_layers_of_a_prompt_are_announced_while_its_step_goes_on(
    make_engine, monkeypatch, num_cores: int, news: list[int]
) -> None:
    monkeypatch.setattr(kv_news, "NEWS_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(num_cores)))
    engine = make_engine()
    pool = engine.runner.pool
    announced: list[KvComputedEvent] = []
    seen: list[tuple[int, torch.Tensor]] = []

    def look() -> None:
        for event in announced:
            num_layers = pool.progress.layers_of(event.step)
            layers = [pool.layer(index)[list(event.block_ids)] for index in range(num_layers)]
            seen.append((num_layers, torch.stack(layers).clone()))

    engine.report_to(announced.extend)
    engine.prepare()
    assert announced == []
    (prompt,) = make_prompts([40])
    engine.apply(0, Submit(make_request("r", prompt), PREFILL))
    engine.apply(1, Submit(make_request("s", prompt[::-1]), LOCAL))
    with pool.progress.telling(look):
        outputs = engine.step()
        assert [num_layers for num_layers, _ in seen] == news[:-1]
        engine.step()  # the tokens are out by now
    assert outputs is not None
    assert {output.request_id for output in outputs if isinstance(output, TokenEvent)} == {"r", "s"}
    (whole,) = (output for output in outputs if isinstance(output, KvComputedEvent))
    assert (whole.first_token, whole.num_tokens, whole.step) == (0, 40, None)
    (event,) = announced
    assert replace(event, step=None) == whole
    assert event.step is not None
    assert pool.progress.layers_of(event.step + 2) == 0
    assert [num_layers for num_layers, _ in seen] == news
    for _, kv_LPJGCA in seen:
        for index, kv_PJGCA in enumerate(kv_LPJGCA):
            now_PJGCA = engine.runner.pool.layer(index)[list(whole.block_ids)]
            assert torch.equal(kv_PJGCA, now_PJGCA), "announced before it was written"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_told_of_have_the_bits_of_a_step_in_one_call(
    make_engine, monkeypatch, dtype
) -> None:
    monkeypatch.setattr(kv_news, "NEWS_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    (prompt,) = make_prompts([40])
    found: list[torch.Tensor] = []
    for mode in (LOCAL, PREFILL):
        engine = make_engine(dtype=dtype)
        engine.report_to(lambda outputs: None)
        engine.prepare()
        pool = engine.runner.pool
        told: list[None] = []
        engine.apply(0, Submit(make_request("r", prompt), mode))
        with pool.progress.telling(lambda told=told: told.append(None)):
            engine.step()
        assert len(told) == (0 if mode is LOCAL else 2)
        found.append(torch.stack([pool.layer(index) for index in range(3)]).clone())
    assert torch.equal(*found)


def test_layers_that_nobody_waits_for_are_not_told_of(make_engine, monkeypatch) -> None:
    monkeypatch.setattr(kv_news, "NEWS_BYTES", 1)
    engine = make_engine()
    engine.report_to(lambda outputs: pytest.fail(f"{outputs}"))
    (prompt,) = make_prompts([40])
    engine.apply(0, Submit(make_request("r", prompt), LOCAL))
    reached: list[None] = []
    with engine.runner.pool.progress.telling(lambda: reached.append(None)):
        assert engine.step() is not None
    assert reached == []


def test_where_all_cores_compute_a_prompts_last_step_leaves_beside_its_first_token(
    make_engine, monkeypatch
) -> None:
    monkeypatch.setattr(kv_news, "NEWS_BYTES", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    engine = make_engine(max_num_batched_tokens=32)
    progress = engine.runner.pool.progress
    engine.report_to(lambda outputs: None)
    (prompt,) = make_prompts([80])
    engine.apply(0, Submit(make_request("r", prompt), PREFILL))
    told: list[int] = []
    counts: list[int] = []
    with progress.telling(lambda: told.append(progress.layers_of(len(counts) + 1))):
        for _ in range(4):
            engine.step()
            counts.append(len(told))
    # Two steps are told of at their ends, and the third, which draws, when its token is out.
    assert counts == [1, 2, 2, 3]


def test_little_kv_is_announced_with_its_step(make_engine) -> None:
    engine = make_engine()
    seen: list[object] = []
    engine.report_to(seen.extend)
    (prompt,) = make_prompts([40])
    engine.apply(0, Submit(make_request("r", prompt), PREFILL))
    assert engine.step() is not None
    assert seen == []
