"""Groups of ranks without our launcher: torchrun, or RANK and its companions set by hand."""

import asyncio
import os
import signal
import socket
from pathlib import Path

import httpx
import psutil
import pytest
from redis import asyncio as aioredis
from safetensors.torch import load_file, save_file

from engine.parallel import RankEnvironment
from engine.request import SamplingParams
from tests.checkpoints import tiny_checkpoint
from tests.e2e.one_engine import one_engine
from tests.e2e.services import services_of

PROMPT = list(range(10, 110))
NUM_TOKENS = 20
# 3 layers x (key, value) x 2 heads x 16 x 4 bytes
BYTES_PER_TOKEN = 768
END_TIMEOUT_S = 60.0
BODY = {
    "prompt": PROMPT,
    "max_tokens": NUM_TOKENS,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 0,
    "isthmus": {"report": True},
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    return RankEnvironment(
        rank=rank, world_size=size, local_rank=rank, master_address="127.0.0.1", master_port=port
    ).variables()


async def test_groups_that_torchrun_starts_are_joined_by_redis_alone(
    tmp_path: Path, redis_url: str
) -> None:
    model = tiny_checkpoint(tmp_path)
    with one_engine(model, "float32") as engine:
        sampling = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, num_top_logprobs=0
        )
        expected = engine.answer(PROMPT, sampling)
    async with services_of(model, redis_url, tmp_path) as services:
        for role, layout in (("prefill", "pp=2"), ("decode", "tp=2")):
            flags = ("--parallel", layout, "--dtype", "float32")
            await services.start(role, role, *flags, num_ranks=2)
        await services.start("gateway", "gateway")
        address = await services.ready(1, 1)
        async with httpx.AsyncClient() as client:
            answer = await client.post(f"http://{address}/v1/completions", json=BODY, timeout=60)
        assert answer.status_code == 200, answer.text
        report = answer.json()["isthmus"]
        assert report["handover_bytes"] == len(PROMPT) * BYTES_PER_TOKEN
        assert report["degradations"] == []
        found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
        assert found == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-4)
        torchrun = services.processes["decode"]
        ranks = psutil.Process(torchrun.pid).children(recursive=True)
        torchrun.send_signal(signal.SIGTERM)
        async with asyncio.timeout(END_TIMEOUT_S):
            await torchrun.wait()
        assert len(ranks) == 2
        assert not any(rank.is_running() for rank in ranks)
        assert "rank 1 ends with rank 0" in services.log("decode")
        assert "Traceback" not in services.log("decode").partition("torch/distributed")[0]


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_rank_whose_checkpoint_lacks_a_tensor_is_named_and_nothing_serves(
    role: str, tmp_path: Path, redis_url: str, redis: aioredis.Redis
) -> None:
    model = tiny_checkpoint(tmp_path / "whole")
    damaged = tiny_checkpoint(tmp_path / "damaged")
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, damaged / "model.safetensors")
    port = free_port()
    async with services_of(model, redis_url, tmp_path) as services:
        for rank, path in enumerate([model, damaged]):
            await services.start(
                *(f"rank{rank}", role, "--parallel", "pp=2"),
                model=path,
                environment=rank_environment(rank, 2, port),
            )
        async with asyncio.timeout(END_TIMEOUT_S):
            statuses = [await process.wait() for process in services.processes.values()]
        assert statuses == [1, 1]
        told, own = (services.log(name).splitlines()[-1] for name in ("rank0", "rank1"))
        assert told.startswith("error: rank 1 failed: CheckpointError: ")
        assert str(damaged) in told
        assert "lacks model.norm.weight" in told
        assert own.startswith("error: ")
        assert "lacks model.norm.weight" in own
        assert not (tmp_path / "rank0.json").exists(), "it never served"
        assert not await redis.keys("*worker*"), "it was never in the registry"


async def refused(
    tmp_path: Path, redis_url: str, parallel: str, environment: dict[str, str]
) -> str:
    """What a worker says that ends before it has read anything."""
    model = tiny_checkpoint(tmp_path)
    async with services_of(model, redis_url, tmp_path) as services:
        process = await services.start(
            "worker", "decode", "--parallel", parallel, environment=environment
        )
        async with asyncio.timeout(END_TIMEOUT_S):
            assert await process.wait() == 1
        (told,) = (line for line in services.log("worker").splitlines() if "error: " in line)
        return told


async def test_a_world_size_that_is_not_the_layouts_is_refused(
    tmp_path: Path, redis_url: str
) -> None:
    told = await refused(tmp_path, redis_url, "tp=3", rank_environment(0, 2, free_port()))
    assert told == (
        "error: WORLD_SIZE is 2, but the layout tp=3 has 3 ranks: start 3 processes, or give a "
        "layout of 2"
    )


async def test_ranks_that_nobody_started_are_refused(tmp_path: Path, redis_url: str) -> None:
    assert "RANK" not in os.environ
    told = await refused(tmp_path, redis_url, "tp=2", {})
    assert "the layout tp=2 has 2 ranks, but RANK is not set" in told


async def test_a_layout_that_the_model_does_not_allow_is_refused(
    tmp_path: Path, redis_url: str
) -> None:
    told = await refused(tmp_path, redis_url, "tp=6", rank_environment(0, 6, free_port()))
    assert "tp=6 needs tp at most 4: tensor parallelism splits 4 query heads" in told
    assert "use tp=4 or tp=3,pp=2" in told


async def test_an_address_that_is_another_workers_is_refused(
    tmp_path: Path, redis_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        told = await refused(tmp_path, redis_url, "tp=2", rank_environment(0, 2, port))
    assert f"rank 0 cannot keep the ranks' store on 127.0.0.1:{port}" in told
    assert "Each needs a MASTER_PORT of its own" in told


async def test_pools_that_differ_are_told_both_sides_and_the_answer_comes_anyway(
    tmp_path: Path, redis_url: str
) -> None:
    model = tiny_checkpoint(tmp_path / "one")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    other = other.rename(other.with_name(model.name))
    async with services_of(model, redis_url, tmp_path) as services:
        await services.start("gateway", "gateway")
        await services.start("decode", "decode", "--dtype", "float32")
        for name, flags, path, differing in (
            ("precision", ("--dtype", "float32", "--kv-dtype", "int8"), model, ("float32", "int8")),
            ("checkpoint", ("--dtype", "float32"), other, ()),
        ):
            prefill = await services.start(name, "prefill", *flags, model=path)
            address = await services.ready(1, 1)
            async with httpx.AsyncClient() as client:
                answer = await client.post(
                    f"http://{address}/v1/completions", json=BODY, timeout=60
                )
            assert answer.status_code == 200, answer.text
            kinds = {
                each["kind"]: each["reason"] for each in answer.json()["isthmus"]["degradations"]
            }
            assert kinds["retry"] == "layout_mismatch", kinds
            assert kinds["local_prefill"] == "prefill_failed", kinds
            (told,) = (
                line
                for line in services.log("gateway").splitlines()
                if "sequence lost" in line and prefill_id(services.log(name)) in line
            )
            ours, separator, theirs = told.partition(" but ")
            assert separator
            assert "decode-" in ours + theirs
            for word in differing:
                assert (f"dtype='{word}'" in ours) != (f"dtype='{word}'" in theirs), told
            if not differing:
                digests = [
                    part.partition(", model ")[2].partition(",")[0] for part in (ours, theirs)
                ]
                assert len(set(digests)) == 2, told
            prefill.send_signal(signal.SIGTERM)
            async with asyncio.timeout(END_TIMEOUT_S):
                assert await prefill.wait() == 0


def prefill_id(log: str) -> str:
    """The worker id that a prefill worker's log names when it is ready."""
    return log.partition("ready worker_id=")[2].partition(" ")[0]
