"""What a request and a token cost the gateway in CPU time, over workers that compute nothing.

python -m benchmarks.gateway [--quick] [--json FILE] [--profile FILE]

The gateway is a process of its own; workers and clients share another. A load of short answers and
one of long answers give the cost of a request and of a token: the slope between them is a token.
A short answer has two tokens, one of each kind of worker, as every longer one begins.

Beside each figure stands the floor: what `benchmarks.gateway_floor`, which only passes messages on
through uvicorn and grpc.aio, costs under the same load in the same minute. The rest is our work.
"""

import argparse
import asyncio
import cProfile
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec
import uvloop

import mesh  # noqa: F401 - says how gRPC's core runs, so it comes before grpc
from benchmarks.gateway_floor import floor_over
from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.inference_pb2_grpc import InferenceStub
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.fakes.gateway import MODEL_ID, gateway_over_started
from tests.fakes.workers import FakeDecodeWorker, FakePrefillWorker, FakeWorker, running

if TYPE_CHECKING:
    from grpc import aio

STEP_S = 0.004
SHORT_TOKENS, LONG_TOKENS = 2, 130
PROMPT = ("The isthmus joins two lands. " * 9)[:256]
"""256 tokens of the fake workers' tokenizer, as in the closed load of `benchmarks.serving`."""
HTTP_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """CPU time of a process."""

    ms_per_request: float
    """Of a streamed answer without its tokens, connection kept."""
    us_per_token: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What one door costs under one load."""

    door: str
    num_clients: int
    gateway: Cost
    floor: Cost


async def http_load(address: str, *, num_clients: int, num_requests: int, max_tokens: int) -> None:
    """Streamed chats, each client one after the other on its own connection."""
    host, _, port = address.rpartition(":")
    body = json.dumps(
        {
            "model": MODEL_ID,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": max_tokens,
            "stream": True,
        }
    ).encode()
    request = HTTP_HEAD + b"content-length: %d\r\n\r\n" % len(body) + body

    async def client() -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        for _ in range(num_requests // num_clients):
            writer.write(request)
            answer = await reader.readuntil(b"data: [DONE]\n\n\r\n0\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
        writer.close()
        await writer.wait_closed()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(num_clients):
            tasks.create_task(client())


async def grpc_load(address: str, *, num_clients: int, num_requests: int, max_tokens: int) -> None:
    """The same over isthmus.v1.Inference."""
    request = pb.ChatRequest(
        messages=[pb.ChatMessage(role="user", content=PROMPT)],
        sampling=SamplingParams(max_tokens=max_tokens),
    )

    async def client(channel: "aio.Channel") -> None:
        stub = InferenceStub(channel)
        for _ in range(num_requests // num_clients):
            async for _ in stub.Chat(request):
                pass

    async with open_channel(address) as channel, asyncio.TaskGroup() as tasks:
        for _ in range(num_clients):
            tasks.create_task(client(channel))


class Served:
    """A process that is measured: the gateway, or its floor."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._process = process
        self._asks = process.stdin
        self._answers = process.stdout
        self.addresses: dict[str, str] = {}
        """By door."""

    async def __aenter__(self) -> Self:
        self.addresses = json.loads(await self._answers.readline())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._asks.close()
        await self._process.wait()

    async def cpu_s(self) -> float:
        """CPU time since its start, of all its threads."""
        self._asks.write(b"\n")
        return float(await self._answers.readline())


async def measure(served: Served, door: str, *, num_clients: int, num_repeats: int) -> Cost:
    """Both loads, after a short one that warms the path.

    The least of a few repeats counts: what else runs on the machine only ever adds CPU time.
    """
    load = {"http": http_load, "grpc": grpc_load}[door]

    async def request_s(num_requests: int, max_tokens: int) -> float:
        before_s = await served.cpu_s()
        await load(
            served.addresses[door],
            num_clients=num_clients,
            num_requests=num_requests,
            max_tokens=max_tokens,
        )
        return (await served.cpu_s() - before_s) / num_requests

    await request_s(64, 8)
    num_long = max(4, 2 * num_clients)
    repeats = range(num_repeats)
    short_s = min([await request_s(256, SHORT_TOKENS) for _ in repeats])
    long_s = min([await request_s(num_long, LONG_TOKENS) for _ in repeats])
    token_s = (long_s - short_s) / (LONG_TOKENS - SHORT_TOKENS)
    return Cost(
        ms_per_request=round((short_s - SHORT_TOKENS * token_s) * 1e3, 3),
        us_per_token=round(token_s * 1e6, 2),
    )


async def serve(addresses: Sequence[str], profile: Path | None) -> None:
    """The child: a gateway over workers that run elsewhere, until standard input ends."""
    workers: list[FakeWorker] = [FakePrefillWorker("p0"), FakeDecodeWorker("d0")]
    for worker, address in zip(workers, addresses, strict=True):
        worker.address = address
    profiler = cProfile.Profile() if profile is not None else None
    async with gateway_over_started(*workers, max_num_sequences=1024) as gateway:
        if profiler is not None:
            profiler.enable()
        await tell_cpu_time(
            {"http": gateway.http_url.removeprefix("http://"), "grpc": gateway.grpc_address}
        )
        if profiler is not None:
            profiler.disable()
            profiler.dump_stats(str(profile))


async def serve_floor(addresses: Sequence[str]) -> None:
    """The other child."""
    prefill, decode = addresses
    async with floor_over(prefill, decode, prompt=list(PROMPT.encode())) as doors:
        await tell_cpu_time(doors)


async def tell_cpu_time(doors: Mapping[str, str]) -> None:
    """Print the address of each door, then answer each line that comes with the CPU time so far."""
    print(json.dumps(doors), flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        print(time.process_time(), flush=True)


@asynccontextmanager
async def started(*flags: str) -> AsyncIterator[Served]:
    """This program as a child."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "benchmarks.gateway", *flags),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    async with Served(process) as served:
        yield served


async def main(*, quick: bool, profile: Path | None) -> list[Figures]:
    """Start workers here, the gateway and its floor as children; measure both doors."""
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0", step_s=STEP_S)
    num_repeats = 3 if quick else 9
    profiling = ["--profile", str(profile)] if profile is not None else []
    figures = []
    print(f"{'':16}{'ms of CPU a request':>30}{'us of CPU a token':>30}")
    print(f"{'door':6}{'clients':>10}" + f"{'gateway':>10}{'floor':>10}{'ours':>10}" * 2)
    async with (
        running(prefill, decode),
        started("--serve", prefill.address, decode.address, *profiling) as gateway,
        started("--floor", prefill.address, decode.address) as floor,
    ):
        for door, num_clients in itertools.product(gateway.addresses, (1, 8, 32)):
            costs = {
                name: await measure(served, door, num_clients=num_clients, num_repeats=num_repeats)
                for name, served in (("gateway", gateway), ("floor", floor))
            }
            figures.append(Figures(door=door, num_clients=num_clients, **costs))
            print(row(figures[-1]), flush=True)
    return figures


def row(figures: Figures) -> str:
    """One line of the table."""
    cells = []
    for name, digits in (("ms_per_request", 3), ("us_per_token", 1)):
        whole, floor = (getattr(cost, name) for cost in (figures.gateway, figures.floor))
        cells += [f"{value:10.{digits}f}" for value in (whole, floor, whole - floor)]
    return f"{figures.door:6}{figures.num_clients:10d}" + "".join(cells)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile of the gateway")
    for child in ("--serve", "--floor"):
        parser.add_argument(child, nargs=2, metavar="ADDRESS", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parsed(sys.argv[1:])
    if options.serve:
        uvloop.run(serve(options.serve, options.profile))
    elif options.floor:
        uvloop.run(serve_floor(options.floor))
    else:
        results = uvloop.run(main(quick=options.quick, profile=options.profile))
        if options.json is not None:
            options.json.write_bytes(
                msgspec.json.format(msgspec.json.encode([asdict(row) for row in results]))
            )
