"""One mesh for all tests that only ask it: it takes seconds to start."""

from collections.abc import AsyncIterator, Iterator

import pytest

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.e2e.mesh_process import MeshProcess, mesh_process


@pytest.fixture(scope="package")
def demo_mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcess]:
    """The demo model in bfloat16 on one prefill and one decode worker; leave it idle."""
    with mesh_process(tmp_path_factory.mktemp("demo-mesh"), "--dtype", "bfloat16") as running:
        yield running
        crashed = [entry for entry in running.processes() if entry["num_restarts"]]
        assert not crashed, "a crash that the launcher heals is one all the same"
        assert len(running.processes()) == 4, "and one that it is healing"


@pytest.fixture
async def demo_stub(demo_mesh: MeshProcess) -> AsyncIterator[pb_grpc.InferenceStub]:
    async with open_channel(demo_mesh.grpc) as channel:
        yield pb_grpc.InferenceStub(channel)
