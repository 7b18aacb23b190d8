"""A service may be stopped as soon as it has said that it is ready."""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway import main as gateway_main
from gateway.config import GatewayConfig
from gateway.session import RecoveryConfig
from gateway.tokenizer import TextModel
from mesh import process, worker
from mesh.worker import WorkerConfig, WorkerIdentity, serving_worker, until_stopped
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_DECODE, WorkerLoad
from tests.fakes.byte_tokenizer import byte_tokenizer


class HealthyEngine:
    def __init__(self) -> None:
        self.dead = asyncio.Event()
        self.death = None


def stopping_when_ready(stopped: list[Path]) -> Callable[..., None]:
    """Writes the ready file and sends SIGTERM before the service does anything else."""

    def write_ready_file(path: Path, *rest: object) -> None:
        process.write_ready_file(path, *rest)  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "this would end the tests"
        os.kill(os.getpid(), signal.SIGTERM)
        stopped.append(path)

    return write_ready_file


async def test_a_worker_drains(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped: list[Path] = []
    drains: list[str] = []
    monkeypatch.setattr(worker, "write_ready_file", stopping_when_ready(stopped))

    async def drained() -> None:
        drains.append("drained")

    async with (
        asyncio.timeout(30),
        serving_worker(
            WorkerConfig(redis_url=redis_url, ready_file=tmp_path / "ready"),
            WorkerIdentity.new(
                WORKER_ROLE_DECODE,
                model_id="m",
                model_digest="d",
                max_context_tokens=1,
                parallel="",
            ),
            add_servicers=lambda server: None,
            service_names=[],
            drained=drained,
            load=WorkerLoad,
            metrics=CollectorRegistry(),
        ) as serving,
    ):
        await until_stopped(HealthyEngine(), serving.stop_asked)
    assert stopped == [tmp_path / "ready"]
    assert drains == ["drained"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


async def test_a_gateway_ends_in_order(
    redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped: list[Path] = []
    monkeypatch.setattr(gateway_main, "write_ready_file", stopping_when_ready(stopped))
    text_model = TextModel(tokenizer=byte_tokenizer(), chat_template=None, special_tokens={})
    config = GatewayConfig(
        redis_url=redis_url,
        http_port=0,
        grpc_port=0,
        drain_grace_s=0,
        ready_file=tmp_path / "ready",
    )
    caplog.set_level("INFO")
    async with asyncio.timeout(30):
        await gateway_main.serve(config, RecoveryConfig(), model_id="m", text_model=text_model)
    assert stopped == [tmp_path / "ready"]
    assert "draining" in caplog.messages
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
