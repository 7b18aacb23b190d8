"""`isthmus demo`: a mesh, one question, its answer and where the time went."""

import asyncio
import sys

from deploy.answer import open_channel, split_line, stream_answer
from deploy.launcher.interrupts import interruptible
from deploy.launcher.mesh import Mesh
from deploy.launcher.mesh_config import MeshConfig
from deploy.progress import console
from deploy.up import visible_mesh
from protos.isthmus.v1 import sampling_pb2

_SAMPLING = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=96)


async def demo(config: MeshConfig, *, question: str, once: bool, verbose: bool) -> int:
    """Ask one question; stay up until Ctrl-C unless `once`. Returns the exit status."""
    was_answered = False

    async def main(hurry: asyncio.Event) -> int:
        nonlocal was_answered
        async with visible_mesh(config, hurry=hurry, verbose=verbose) as mesh:
            await _ask(mesh, question)
            was_answered = True
            if not once:
                _show_urls(mesh)
                await asyncio.Event().wait()
        return 0

    status = await interruptible(main)
    return 0 if was_answered else status


async def _ask(mesh: Mesh, question: str) -> None:
    console.print(f"\n[bold]{question}[/bold]\n")
    async with open_channel(mesh.address("gateway", "grpc")) as channel:
        answer = await stream_answer(
            channel, [("user", question)], sampling=_SAMPLING, on_text=_write
        )
    _write("\n\n")
    print(split_line(answer), flush=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _show_urls(mesh: Mesh) -> None:
    http, grpc = (mesh.address("gateway", kind) for kind in ("http", "grpc"))
    print(
        f"""
OpenAI API   http://{http}/v1
metrics      http://{http}/metrics
gRPC         {grpc}
try          isthmus chat --address {grpc}
Ctrl-C stops the mesh.""",
        flush=True,
    )
