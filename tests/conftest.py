import asyncio
import os
from collections.abc import Callable

import pytest
import uvloop

import mesh  # noqa: F401 - says how gRPC's core runs, so it comes before the tests import grpc

# Many tests run side by side on few cores: numerical libraries get one thread each.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ("tests.fixtures.recorded_spans", "tests.fixtures.redis_server")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Run every async test on the loop that production uses."""
    return {"uvloop": uvloop.new_event_loop}


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and not _has_cuda():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_torch_thread() -> None:
    """Tests that use torch get one intra-op thread; others do not pay for its import."""
    import sys

    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
