"""Services started one by one on "hosts" that share no process, no memory and no files' names.

A host is a set of Linux namespaces (PID, IPC, UTS, mounts), so that shared memory cannot be used;
all that the services are told of each other is the Redis.
"""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import httpx
import pytest

from deploy.launcher.pool_view import pools_seen
from engine.request import SamplingParams
from tests.checkpoints import tiny_checkpoint
from tests.e2e.one_engine import one_engine

READY_TIMEOUT_S = 120.0
PROMPT = list(range(10, 110))
NUM_TOKENS = 20
# 3 layers x (key, value) x 2 heads x 16 x 4 bytes
BYTES_PER_TOKEN = 768
ROLES = ("prefill-worker", "decode-worker", "gateway")
NEW_HOST = (
    *("unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--ipc", "--uts"),
    *(() if os.geteuid() == 0 else ("--user", "--map-root-user")),
)


def has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NEW_HOST, "true"], capture_output=True, check=False).returncode == 0


@asynccontextmanager
async def hosts(model: Path, redis_url: str, folder: Path) -> AsyncIterator[dict[str, str]]:
    """A host for each role; the addresses of the gateway once all of them serve."""
    async with AsyncExitStack() as stack:
        ready_files = {role: folder / f"{role}.json" for role in ROLES}
        processes = {}
        for role, ready_file in ready_files.items():
            own = ("--http-port=0", "--grpc-port=0") if role == "gateway" else ("--dtype=float32",)
            output = stack.enter_context((folder / f"{role}.log").open("wb"))
            processes[role] = await asyncio.create_subprocess_exec(
                *(*NEW_HOST, sys.executable, "-m", "deploy.cli", role, *own),
                *("--model", str(model), "--redis-url", redis_url),
                *("--ready-file", str(ready_file)),
                stdout=output,
                stderr=output,
            )
            stack.push_async_callback(processes[role].wait)
            stack.callback(processes[role].kill)
        async with asyncio.timeout(READY_TIMEOUT_S):
            while not all(file.exists() for file in ready_files.values()):
                for role, process in processes.items():
                    assert process.returncode is None, (folder / f"{role}.log").read_text()
                await asyncio.sleep(0.05)
        addresses: dict[str, str] = json.loads(ready_files["gateway"].read_text())["addresses"]
        async with asyncio.timeout(READY_TIMEOUT_S):
            await pools_seen(addresses["http"], {"prefill": 1, "decode": 1})
        yield addresses


@pytest.mark.skipif(not has_namespaces(), reason="no namespaces for this user here")
async def test_services_on_hosts_of_their_own_are_joined_by_redis_alone(
    tmp_path: Path, redis_url: str
) -> None:
    model = tiny_checkpoint(tmp_path)
    with one_engine(model, "float32") as engine:
        sampling = SamplingParams(
            temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, seed=1, num_top_logprobs=0
        )
        expected = engine.answer(PROMPT, sampling)
    async with hosts(model, redis_url, tmp_path) as addresses, httpx.AsyncClient() as client:
        answer = await client.post(
            f"http://{addresses['http']}/v1/completions",
            json={
                "prompt": PROMPT,
                "max_tokens": NUM_TOKENS,
                "temperature": 0,
                "ignore_eos": True,
                "logprobs": 0,
                "isthmus": {"report": True},
            },
            timeout=60,
        )
    assert answer.status_code == 200, answer.text
    report = answer.json()["isthmus"]
    assert report["data_plane"] == "tcp"
    assert report["handover_bytes"] == len(PROMPT) * BYTES_PER_TOKEN
    assert report["degradations"] == []
    found = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert found == pytest.approx([entry.logprob for entry in expected.logprobs], abs=1e-5)
