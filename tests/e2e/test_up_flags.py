"""Every flag of `isthmus up` does what its name says."""

import json
import socket
from pathlib import Path

import httpx
import psutil

from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1 import inference_pb2_grpc as pb_grpc
from tests.checkpoints import tiny_checkpoint
from tests.e2e.mesh_process import mesh_process

NUM_PROMPT_TOKENS = 50
# 3 layers x (key, value) x 2 heads x (16 x 1 byte + a scale)
BYTES_PER_TOKEN_FP8 = 240


def free_ports() -> tuple[int, int]:
    """Two that nobody had a moment ago."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        return one.getsockname()[1], two.getsockname()[1]


async def test_up_as_asked_in_every_flag(tmp_path: Path, redis_url: str) -> None:
    model = tiny_checkpoint(tmp_path, dtype="bfloat16")
    http_port, grpc_port = free_ports()
    flags = (
        *("--model", str(model), "--prefill", "2", "--decode", "3"),
        *("--http-port", str(http_port), "--grpc-port", str(grpc_port)),
        *("--redis-url", redis_url, "--dtype", "float16", "--device", "cpu"),
        *("--kv-dtype", "fp8"),
    )
    with mesh_process(tmp_path, *flags) as mesh:
        state = json.loads((tmp_path / "state.json").read_text())
        roles = [entry["role"] for entry in state]
        assert sorted(roles) == ["decode"] * 3 + ["gateway"] + ["prefill"] * 2, "and no Redis"
        for entry in state:
            assert psutil.pid_exists(entry["pid"])
            kinds = {"grpc", "metrics"} | ({"http"} if entry["role"] == "gateway" else set())
            assert set(entry["addresses"]) == kinds
        assert mesh.http == f"http://127.0.0.1:{http_port}"
        assert mesh.grpc == f"127.0.0.1:{grpc_port}"
        async with open_channel(mesh.grpc) as channel:
            models = await pb_grpc.InferenceStub(channel).ListModels(pb.ListModelsRequest())
        assert [each.id for each in models.models] == [model.name]
        workers = set()
        async with httpx.AsyncClient(base_url=mesh.http, timeout=60) as client:
            for start in range(6):
                prompt = [5 + (7 * start + index) % 300 for index in range(NUM_PROMPT_TOKENS)]
                body = {"prompt": prompt, "max_tokens": 4, "isthmus": {"report": True}}
                report = (await client.post("/v1/completions", json=body)).json()["isthmus"]
                assert report["handover_bytes"] == NUM_PROMPT_TOKENS * BYTES_PER_TOKEN_FP8
                workers |= {report["prefill_worker_id"], report["decode_worker_id"]}
        assert len(workers) == 5, "all of them take turns"
