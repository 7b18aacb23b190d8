"""The launcher over fake services: order, restarts, failures at start, and nothing left behind."""

import asyncio
import json
import os
import signal
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from deploy.launcher.child_process import StartError
from deploy.launcher.mesh import MeshEvents, running_mesh
from deploy.launcher.mesh_config import MeshConfig
from engine.errors import PeerUnavailableError
from engine.parallel.layout import ParallelLayout
from tests.fakes.fake_up import fake_programs

REPOSITORY = Path(__file__).parents[2]
QUIET = MeshEvents(
    on_started=lambda name: None, on_ready=lambda name: None, on_output=lambda name, line: None
)


@pytest.fixture(autouse=True)
def private_temp_dir(tmp_path, monkeypatch):
    """Run directories of this test only, under a path short enough for a unix socket."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="it-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)


def config_for(tmp_path, flags=None, **fields) -> MeshConfig:
    defaults = {
        "model": "fake",
        "http_port": 0,
        "grpc_port": 0,
        "state_file": tmp_path / "state.json",
        "programs": fake_programs(tmp_path / "log", flags),
    }
    return MeshConfig(**{**defaults, **fields})


def logged(tmp_path: Path) -> list[str]:
    return (tmp_path / "log").read_text().splitlines()


async def until(condition, timeout_s=20.0):
    """What `condition` returns once it is true."""
    async with asyncio.timeout(timeout_s):
        while True:
            if value := condition():
                return value
            await asyncio.sleep(0.02)


def pids(mesh) -> dict[str, int]:
    return {state.name: state.pid for state in mesh.states()}


async def test_all_services_start_and_stop_in_order(tmp_path, private_temp_dir) -> None:
    config = config_for(tmp_path, num_prefill=2, num_decode=2)
    async with running_mesh(config, QUIET, hurry=asyncio.Event()) as mesh:
        names = [state.name for state in mesh.states()]
        assert names == ["redis", "prefill-0", "prefill-1", "decode-0", "decode-1", "gateway"]
        written = json.loads((tmp_path / "state.json").read_text())
        assert [(entry["role"], entry["pid"]) for entry in written] == [
            (state.role, state.pid) for state in mesh.states()
        ]
        assert mesh.address("gateway", "http").startswith("127.0.0.1:")
        started = list(pids(mesh).values())
    assert not any(psutil.pid_exists(pid) for pid in started)
    assert not (tmp_path / "state.json").exists()
    assert list(private_temp_dir.iterdir()) == []
    ends = [line for line in logged(tmp_path) if not line.endswith("serving")]
    assert ends[:2] == ["gateway draining", "gateway stopped"], "the gateway goes first"
    assert len(ends) == 10


async def test_the_private_redis_is_a_real_one_that_answers(tmp_path) -> None:
    from redis.asyncio import Redis

    config = config_for(tmp_path)
    async with running_mesh(config, QUIET, hurry=asyncio.Event()) as mesh:
        client = Redis.from_url(mesh.redis_url)
        assert await client.set("key", "value", px=1000)
        info = await client.info("server")
        assert info["process_id"] == pids(mesh)["redis"]
        await client.aclose()


async def test_a_given_redis_is_used_and_no_other_started(tmp_path) -> None:
    async with running_mesh(config_for(tmp_path), QUIET, hurry=asyncio.Event()) as first:
        config = config_for(tmp_path, redis_url=first.redis_url, state_file=tmp_path / "second")
        async with running_mesh(config, QUIET, hurry=asyncio.Event()) as second:
            assert "redis" not in pids(second)


@pytest.mark.parametrize("url", ["unix:///nowhere/redis.sock", "redis://127.0.0.1:1", "nonsense"])
async def test_a_redis_that_does_not_answer_is_named_at_once(tmp_path, url) -> None:
    config = config_for(tmp_path, redis_url=url)
    with pytest.raises((PeerUnavailableError, ValueError), match="--redis-url"):
        async with running_mesh(config, QUIET, hurry=asyncio.Event()):
            pass


@pytest.mark.parametrize("role", ["prefill", "decode", "gateway"])
async def test_a_crashed_service_is_started_again(tmp_path, role) -> None:
    config = config_for(tmp_path)
    async with running_mesh(config, QUIET, hurry=asyncio.Event()) as mesh:
        name = role if role == "gateway" else f"{role}-0"
        before = {state.name: state for state in mesh.states()}
        os.kill(before[name].pid, signal.SIGUSR1)  # the fake exits with status 3
        after = await until(
            lambda: next((s for s in mesh.states() if s.name == name and s.num_restarts), None)
        )
        assert after.pid != before[name].pid
        others = {n: p for n, p in pids(mesh).items() if n != name}
        assert others == {n: s.pid for n, s in before.items() if n != name}
        if role == "gateway":
            assert after.addresses == before[name].addresses, "clients know these ports"
        entry = next(
            e for e in json.loads((tmp_path / "state.json").read_text()) if e["name"] == name
        )
        assert (entry["pid"], entry["num_restarts"]) == (after.pid, 1)


GROUPS = {"prefill_parallel": ParallelLayout(tp=2), "decode_parallel": ParallelLayout(tp=3)}


def rank_pids(mesh, name) -> tuple[int, ...]:
    return next((state.rank_pids for state in mesh.states() if state.name == name), ())


async def test_a_worker_has_a_process_for_each_rank_and_all_end_in_order(tmp_path) -> None:
    config = config_for(tmp_path, **GROUPS)
    async with running_mesh(config, QUIET, hurry=asyncio.Event()) as mesh:
        assert [len(rank_pids(mesh, name)) for name in ("prefill-0", "decode-0")] == [2, 3]
        assert rank_pids(mesh, "decode-0")[0] == pids(mesh)["decode-0"]
        followers = sorted(line for line in logged(tmp_path) if " rank " in line)
        assert [line.partition(" cores")[0] for line in followers] == [
            "decode rank 1",
            "decode rank 2",
            "prefill rank 1",
        ]
        started = [pid for name in config.worker_names for pid in rank_pids(mesh, name)]
    assert not any(psutil.pid_exists(pid) for pid in started)
    assert [line for line in logged(tmp_path) if "decode" in line][-2:] == [
        "decode draining",
        "decode stopped",
    ]


@pytest.mark.parametrize("rank", [0, 2])
async def test_the_death_of_any_rank_restarts_all_of_its_worker(tmp_path, rank) -> None:
    async with running_mesh(config_for(tmp_path, **GROUPS), QUIET, hurry=asyncio.Event()) as mesh:
        before, others = rank_pids(mesh, "decode-0"), rank_pids(mesh, "prefill-0")
        os.kill(before[rank], signal.SIGKILL)
        await until(lambda: any(s.name == "decode-0" and s.num_restarts for s in mesh.states()))
        assert set(before).isdisjoint(rank_pids(mesh, "decode-0"))
        assert len(rank_pids(mesh, "decode-0")) == 3
        assert not any(psutil.pid_exists(pid) for pid in before)
        assert rank_pids(mesh, "prefill-0") == others


async def test_a_rank_that_cannot_start_is_named_with_its_words(tmp_path) -> None:
    before = psutil.Process().children()
    flags = {"decode": ("--fail-rank", "2", "--fail", "the checkpoint lacks a tensor")}
    with pytest.raises(StartError) as raised:
        async with running_mesh(
            config_for(tmp_path, flags, **GROUPS), QUIET, hurry=asyncio.Event()
        ):
            pass
    assert str(raised.value) == "decode-0 rank 2 could not start: the checkpoint lacks a tensor"
    assert psutil.Process().children() == before


async def test_a_killed_redis_comes_back_at_the_same_address(tmp_path) -> None:
    from redis.asyncio import Redis

    async with running_mesh(config_for(tmp_path), QUIET, hurry=asyncio.Event()) as mesh:
        os.kill(pids(mesh)["redis"], signal.SIGKILL)
        await until(lambda: any(s.role == "redis" and s.num_restarts for s in mesh.states()))
        client = Redis.from_url(mesh.redis_url)
        assert await client.ping()
        await client.aclose()


async def test_a_service_that_cannot_start_is_quoted_and_nothing_stays(
    tmp_path, private_temp_dir
) -> None:
    before = psutil.Process().children()
    config = config_for(tmp_path, {"decode": ("--fail", "the checkpoint is truncated")})
    with pytest.raises(StartError, match="the checkpoint is truncated") as raised:
        async with running_mesh(config, QUIET, hurry=asyncio.Event()):
            pass
    assert str(raised.value) == "decode-0 could not start: the checkpoint is truncated"
    assert list(private_temp_dir.iterdir()) == []
    assert not (tmp_path / "state.json").exists()
    assert psutil.Process().children() == before


async def test_a_service_that_never_serves_is_given_up(tmp_path) -> None:
    silent = {**fake_programs(tmp_path / "log"), "decode": ["-c", "import time; time.sleep(600)"]}
    config = config_for(tmp_path, programs=silent, ready_timeout_s=1.0)
    with pytest.raises(StartError, match="decode-0 was not ready within 1 s"):
        async with running_mesh(config, QUIET, hurry=asyncio.Event()):
            pass


async def test_a_service_that_does_not_drain_is_killed_when_hurried(tmp_path) -> None:
    hurry = asyncio.Event()
    config = config_for(tmp_path, {"decode": ("--stubborn",)}, drain_grace_s=600.0)
    async with running_mesh(config, QUIET, hurry=hurry) as mesh:
        pid = pids(mesh)["decode-0"]
        hurry.set()
    assert not psutil.pid_exists(pid)


@asynccontextmanager
async def fake_up(tmp_path, *flags):
    """`isthmus up` over fakes as a process of its own, ready."""
    state, log = tmp_path / "state.json", tmp_path / "log"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fakes.fake_up", str(state), str(log), *flags),
        cwd=REPOSITORY,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        line = await process.stdout.readline()
        yield process, line.decode(), state
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


def family(process) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
async def test_a_signal_ends_the_mesh_in_order_with_status_0(
    tmp_path, private_temp_dir, number
) -> None:
    async with fake_up(tmp_path) as (process, line, state):
        assert line.startswith("isthmus is ready in ")
        children = family(process)
        assert len(children) == 4
        process.send_signal(number)
        assert await process.wait() == 0
        assert all(is_gone(child) for child in children)
        assert not state.exists()
        assert list(private_temp_dir.iterdir()) == []
    assert "gateway stopped" in logged(tmp_path)


async def test_killing_the_launcher_kills_every_child(tmp_path, private_temp_dir) -> None:
    async with fake_up(tmp_path) as (process, _, _):
        children = family(process)
        assert len(children) == 4
        process.kill()
        await process.wait()
        await until(lambda: all(is_gone(child) for child in children))
    # What a killed process cannot remove, the next launcher does.
    async with fake_up(tmp_path) as (process, _, _):
        assert len(list(private_temp_dir.iterdir())) == 1


async def test_a_second_ctrl_c_kills(tmp_path) -> None:
    async with fake_up(tmp_path, "decode=--stubborn") as (process, _, _):
        children = family(process)
        process.send_signal(signal.SIGINT)
        await until(lambda: "decode draining" in logged(tmp_path))
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 0
        assert all(is_gone(child) for child in children)


async def test_a_failed_start_is_told_with_status_1(tmp_path, private_temp_dir) -> None:
    flags = ("decode=--fail no such dtype",)
    async with fake_up(tmp_path, *flags) as (process, line, _):
        _, errors = await process.communicate()
        assert line == ""
        assert process.returncode == 1
        assert b"no such dtype" in errors
        assert b"Traceback" not in errors
    assert list(private_temp_dir.iterdir()) == []
