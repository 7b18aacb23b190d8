import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from mesh.process import START_FAILED, report_failure, stop_signals, write_ready_file

SERVICE = """
import asyncio, sys
from mesh.process import run_service, stop_signals

async def serve():
    async with stop_signals() as stop_asked:
        print("up", flush=True)
        await stop_asked.wait()
        print("draining", flush=True)
    print("left", flush=True)

sys.exit(run_service(serve()))
"""

BUSY_PORT = """
import sys
from mesh.process import run_service
from mesh.server import listening

async def serve():
    async with listening(lambda _: None, address=sys.argv[1], drain_grace_s=0):
        print("up", flush=True)

sys.exit(run_service(serve()))
"""

WRONG_REDIS = """
import sys
from mesh.process import run_service
from mesh.registry import connect_redis

async def serve():
    async with connect_redis(sys.argv[1]):
        print("up", flush=True)

sys.exit(run_service(serve()))
"""


@asynccontextmanager
async def running(code: str, *arguments: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, *arguments,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_a_service_in_order(number: signal.Signals) -> None:
    async with asyncio.timeout(60), running(SERVICE) as process:
        assert process.stdout is not None
        assert await process.stdout.readline() == b"up\n"
        process.send_signal(number)
        out, _ = await process.communicate()
    assert out == b"draining\nleft\n"
    assert process.returncode == 0


async def failed(code: str, *arguments: str) -> list[str]:
    async with asyncio.timeout(60), running(code, *arguments) as process:
        out, errors = await process.communicate()
    assert process.returncode == START_FAILED
    assert out == b""
    return errors.decode().splitlines()


async def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        lines = await failed(BUSY_PORT, address)
    assert lines[-1].startswith(f"error: cannot listen on {address}")
    assert not any("Traceback" in line for line in lines)


async def test_a_wrong_redis_url_is_one_line() -> None:
    (line,) = await failed(WRONG_REDIS, "http://user:secret@localhost")
    assert line.startswith("error: cannot read the Redis URL 'http://user:***@localhost'")


async def test_the_first_signal_sets_the_event_and_gives_the_handlers_back() -> None:
    async with asyncio.timeout(10), stop_signals([signal.SIGUSR1, signal.SIGUSR2]) as stop_asked:
        os.kill(os.getpid(), signal.SIGUSR1)
        await stop_asked.wait()
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL


async def test_without_a_signal_the_handlers_are_given_back_at_the_end() -> None:
    async with stop_signals([signal.SIGUSR1]) as stop_asked:
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_DFL
    assert not stop_asked.is_set()
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


def test_a_deliberate_error_inside_task_groups_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inner = ExceptionGroup("inner", [KeyError("noise"), CheckpointError("model.gguf:\nis cut")])
    assert report_failure(ExceptionGroup("outer", [inner])) == START_FAILED
    assert capsys.readouterr().err == "error: model.gguf: is cut\n"


def test_a_bug_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    assert report_failure(KeyError("bug")) == START_FAILED
    assert caplog.records[0].exc_info is not None


def test_the_ready_file_is_whole_when_it_is_there(tmp_path: Path) -> None:
    path = tmp_path / "ready.json"
    write_ready_file(path, "decode", {"grpc": "127.0.0.1:1"})
    assert json.loads(path.read_text()) == {
        "role": "decode",
        "pid": os.getpid(),
        "addresses": {"grpc": "127.0.0.1:1"},
    }
    assert list(tmp_path.iterdir()) == [path]
    write_ready_file(None, "decode", {})


@pytest.fixture(autouse=True)
def _no_leftover_loop_handlers() -> Iterator[None]:
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_an_end_whose_output_nobody_reads_has_its_status() -> None:
    code = "import sys; from mesh.process import end_process; print('told'); end_process(3)"
    reading, writing = os.pipe()
    os.close(reading)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdout=writing,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    os.close(writing)
    _, stderr = await process.communicate()
    assert (process.returncode, stderr) == (3, b"")
