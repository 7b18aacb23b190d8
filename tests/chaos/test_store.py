"""Conversations outlive the workers that computed them; requests outlive the store."""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from engine.request import SamplingParams
from mesh.channel import open_channel
from mesh.convert import sampling_to_pb
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.e2e.mesh_process import MeshProcess, mesh_process
from tests.e2e.one_engine import one_engine

TIMEOUT_S = 90.0
BLOCK_TOKENS = 16
FILED, PINNED = "isthmus_store_filed_blocks", "isthmus_store_pinned_blocks"
DECISIONS = "isthmus_prefix_decisions_total"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def mesh_of(tmp_path: Path, model: Path, *flags: str) -> AbstractContextManager[MeshProcess]:
    """With a store; a tiny model needs no gigabyte of it, and taking that takes time."""
    flags = ("--model", str(model), "--store", "--dtype", "float32", *flags)
    return mesh_process(tmp_path, *flags, environment={"ISTHMUS_STORE__MEMORY_BYTES": "16000000"})


def tokens_of(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(f"store {seed}")
    return [draw.randrange(3, VOCAB_SIZE) for _ in range(num_tokens)]


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


async def ask(
    mesh: MeshProcess,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    degraded: Sequence[tuple[str, str]] | None = (),
) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were cached; None: it may say anything."""
    said: list[tuple[str, str]] = []
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=prompt), sampling=sampling_to_pb(greedy(max_tokens))
    )
    token_ids: list[int] = []
    num_cached = 0
    async with open_channel(mesh.grpc) as channel:
        async for response in pb_grpc.InferenceStub(channel).Generate(request, timeout=TIMEOUT_S):
            for delta in response.deltas:
                token_ids += delta.token_ids
            num_cached = response.usage.num_cached_tokens or num_cached
            said += [(each.kind, each.reason) for each in response.report.degradations]
    assert degraded is None or said == list(degraded)
    return token_ids, num_cached


async def until(is_so: Callable[[], bool], timeout_s: float = TIMEOUT_S) -> None:
    end_s = time.monotonic() + timeout_s
    while not await asyncio.to_thread(_tried, is_so):
        assert time.monotonic() < end_s, "it did not come to be"
        await asyncio.sleep(0.05)


def _tried(is_so: Callable[[], bool]) -> bool:
    """A process that is being replaced answers nothing, or is not in the state file."""
    try:
        return is_so()
    except (OSError, IndexError):
        return False


async def replace(mesh: MeshProcess, *roles: str) -> None:
    """Kill workers and wait until others serve in their place, known to the gateway and Redis."""
    old = {role: mesh.kill(role) for role in roles}
    await until(
        lambda: all(
            [entry["pid"] for entry in mesh.processes(role)] not in ([], [pid])
            for role, pid in old.items()
        )
    )


def store_is_idle(mesh: MeshProcess) -> bool:
    names = (PINNED, "isthmus_store_arriving_blocks", "isthmus_store_open_fetches")
    return all(mesh.metric("store", name) == 0 for name in (*names, "isthmus_kv_leases"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("prefill", "decode"), [("tp=1", "tp=1"), ("tp=2", "pp=3")])
async def test_second_turn_computes_only_new_tokens_after_both_workers_were_replaced(
    tmp_path: Path, model: Path, prefill: str, decode: str
) -> None:
    question, follow_up = tokens_of(1, 200), tokens_of(2, 30)
    layouts = ("--prefill-parallel", prefill, "--decode-parallel", decode)
    with mesh_of(tmp_path, model, *layouts) as mesh:
        answer, _ = await ask(mesh, question, 60)
        kept = (len(question) + len(answer) - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        assert kept == 256, "most of the answer is among it: decode publishes, too"
        await until(lambda: mesh.metric("store", FILED) == kept // BLOCK_TOKENS)
        await replace(mesh, "prefill", "decode")
        second = [*question, *answer, *follow_up]
        answered, num_cached = await ask(mesh, second, 20)
        assert mesh.metric("prefill", "isthmus_engine_prefill_tokens_total") == len(second) - kept
        assert mesh.metric("decode", "isthmus_engine_prefill_tokens_total") == 0
        assert mesh.metric("prefill", "isthmus_prefix_fetched_tokens_total") == kept == num_cached
        assert mesh.metric("prefill", DECISIONS, decision="fetch", reason="unmeasured") == 1
        await until(lambda: store_is_idle(mesh))
    with one_engine(model, "float32") as engine:
        assert engine.answer(question, greedy(60)).token_ids == answer
        assert engine.answer(second, greedy(20)).token_ids == answered


@pytest.mark.timeout(300)
async def test_requests_go_on_without_the_store_and_find_it_again(
    tmp_path: Path, model: Path
) -> None:
    with mesh_of(tmp_path, model) as mesh:
        first, _ = await ask(mesh, tokens_of(1, 100), 20)
        await until(lambda: mesh.metric("store", FILED) > 0)

        stopped = mesh.kill("store", how=signal.SIGSTOP)
        begin_s = time.monotonic()
        await ask(mesh, tokens_of(3, 100), 20, degraded=[("prefix_fetch", "deadline")])
        assert time.monotonic() - begin_s < 5, "a store that is stuck is not waited for"
        assert mesh.metric("prefill", DECISIONS, decision="compute", reason="deadline") == 1
        assert stopped == mesh.kill("store", how=signal.SIGCONT)

        await replace(mesh, "store")
        again, num_cached = await ask(mesh, tokens_of(1, 100), 20)
        assert again == first
        assert num_cached == 96, "in the worker's own cache"
        # What ends now goes to the new store, once the workers have heard of it.
        await until(lambda: mesh.metric("store", "isthmus_kv_leases") == 0)
        for seed in range(10, 200):
            await ask(mesh, tokens_of(seed, 40), 4, degraded=None)
            if mesh.metric("store", FILED) > 0:
                break
        assert mesh.metric("store", FILED) > 0
        await until(lambda: store_is_idle(mesh), timeout_s=2)
