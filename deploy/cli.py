"""The `isthmus` command: what it can be asked for; each command's work is in a module of its own.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import asyncio
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mesh  # noqa: F401 - says how gRPC's core runs, so it comes before any command imports grpc
from engine.errors import IsthmusError

if TYPE_CHECKING:
    from engine.parallel.layout import ParallelLayout

app = typer.Typer(
    name="isthmus",
    help="Serves large language models with disaggregated prefill and decode.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


_QUESTION = "Explain in two sentences why the sky is blue."


class Dtype(StrEnum):
    """Of weights, and of the KV cache unless `KvDtype` says otherwise."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class KvDtype(StrEnum):
    """Of KV pools, and of what handovers carry."""

    AUTO = "auto"
    INT8 = "int8"
    FP8 = "fp8"


class Device(StrEnum):
    """Where the engine computes."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Model = Annotated[
    str,
    typer.Option(help="demo, a Hugging Face directory, a .gguf file, or a Hugging Face id."),
]
Prefill = Annotated[int, typer.Option(min=0, help="Prefill workers; 0: decode prefills locally.")]
Decode = Annotated[int, typer.Option(min=1, help="Decode workers.")]
PrefillParallel = Annotated[
    str, typer.Option(help="Ranks of each prefill worker, by axis: tp=2,pp=2.")
]
DecodeParallel = Annotated[str, typer.Option(help="Ranks of each decode worker, by axis.")]
HttpPort = Annotated[int, typer.Option(min=0, max=65535, help="OpenAI API; 0 picks a free port.")]
GrpcPort = Annotated[int, typer.Option(min=0, max=65535, help="gRPC API; 0 picks a free port.")]
Store = Annotated[
    bool, typer.Option(help="Keep KV blocks in a process of their own: prefixes outlive workers.")
]
RedisUrl = Annotated[
    str, typer.Option(help="A running Redis; without it a private one is started.")
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: the checkpoint's own.")]
KvDtypeOption = Annotated[
    KvDtype,
    typer.Option(help="auto: as --dtype; int8 or fp8 take half of bfloat16, and change answers."),
]
DeviceOption = Annotated[Device, typer.Option(help="auto: cuda where there is a device.")]
StateFile = Annotated[
    Path | None, typer.Option(help="Write role, pid and addresses of each process here (JSON).")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show what the services log.")]
GrpcAddress = Annotated[str, typer.Option(help="host:port of a gateway's gRPC server.")]


@app.command()
def up(
    *,
    model: Model = "demo",
    prefill: Prefill = 1,
    decode: Decode = 1,
    prefill_parallel: PrefillParallel = "tp=1",
    decode_parallel: DecodeParallel = "tp=1",
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 50051,
    store: Store = False,
    redis_url: RedisUrl = "",
    dtype: DtypeOption = Dtype.AUTO,
    kv_dtype: KvDtypeOption = KvDtype.AUTO,
    device: DeviceOption = Device.AUTO,
    state_file: StateFile = None,
    verbose: Verbose = False,
) -> None:
    """Start a whole mesh on this machine and keep it up until Ctrl-C."""
    from deploy import up as command
    from deploy.launcher.mesh_config import MeshConfig

    prefill_layout = _layout("--prefill-parallel", prefill_parallel)
    decode_layout = _layout("--decode-parallel", decode_parallel)
    path = command.located_model(model, os.environ)
    config = MeshConfig(
        model=str(path),
        num_prefill=prefill,
        num_decode=decode,
        prefill_parallel=prefill_layout,
        decode_parallel=decode_layout,
        http_port=http_port,
        grpc_port=grpc_port,
        has_store=store,
        redis_url=redis_url,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=device,
        state_file=state_file,
    )
    command.check_layouts(config)
    _finish(asyncio.run(command.up(config, verbose=verbose)))


@app.command()
def demo(
    *,
    once: Annotated[bool, typer.Option(help="Stop after the answer.")] = False,
    question: Annotated[str, typer.Option(help="What to ask.")] = _QUESTION,
    http_port: HttpPort = 8000,
    grpc_port: GrpcPort = 50051,
    verbose: Verbose = False,
) -> None:
    """Start a mesh with the demo model, ask it one question and show where the time went."""
    from deploy import demo as command
    from deploy.launcher.mesh_config import MeshConfig
    from deploy.up import located_model

    path = located_model("demo", os.environ)
    config = MeshConfig(model=str(path), http_port=http_port, grpc_port=grpc_port)
    _finish(asyncio.run(command.demo(config, question=question, once=once, verbose=verbose)))


@app.command()
def chat(
    *,
    address: GrpcAddress = "127.0.0.1:50051",
    system: Annotated[str, typer.Option(help="A system message for the conversation.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
) -> None:
    """Chat with a running mesh."""
    from deploy import chat as command

    _finish(command.chat(address, system=system, max_tokens=max_tokens, temperature=temperature))


@app.command()
def status(
    *,
    redis_url: Annotated[str, typer.Option(help="The Redis of the mesh.")] = "",
) -> None:
    """Show the pools of a running mesh, as its Redis knows them; by default the local ones."""
    from deploy import status as command

    urls = [redis_url] if redis_url else command.local_redis_urls()
    _finish(asyncio.run(command.status(urls)))


@app.command()
def doctor() -> None:
    """Say what this machine has and what is missing."""
    from deploy import doctor as command

    _finish(command.doctor(os.environ))


@app.command()
def health(address: Annotated[str, typer.Argument(help="host:port of a gRPC server.")]) -> None:
    """Ask one server of the mesh whether it serves; status 0 if so."""
    from deploy import health as command

    _finish(command.health(address))


_PASS_THROUGH = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _pass_through(module: str, context: typer.Context) -> None:
    """Become `python -m module` with the same arguments; its own --help answers."""
    os.execv(sys.executable, [sys.executable, "-m", module, *context.args])


@app.command(context_settings=_PASS_THROUGH)
def gateway(context: typer.Context) -> None:
    """Start a gateway alone; `isthmus gateway --help` lists its flags."""
    _pass_through("gateway", context)


@app.command("prefill-worker", context_settings=_PASS_THROUGH)
def prefill_worker(context: typer.Context) -> None:
    """Start a prefill worker alone."""
    _pass_through("prefill_worker", context)


@app.command("decode-worker", context_settings=_PASS_THROUGH)
def decode_worker(context: typer.Context) -> None:
    """Start a decode worker alone."""
    _pass_through("decode_worker", context)


@app.command("store", context_settings=_PASS_THROUGH)
def store(context: typer.Context) -> None:
    """Start a store of KV blocks alone."""
    _pass_through("kv_transfer", context)


def _layout(flag: str, text: str) -> "ParallelLayout":
    from engine.parallel.layout import ParallelLayout

    try:
        return ParallelLayout.parse(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}") from None


def _finish(status: int) -> None:
    raise typer.Exit(status)


def main() -> None:
    """Entry point: an error that we raised on purpose is one line, not a traceback."""
    try:
        app()
    except (IsthmusError, ValueError) as error:
        typer.secho(f"isthmus: {error}", err=True, fg="red")
        sys.exit(1)


if __name__ == "__main__":
    main()
