"""What a request and a token cost the gateway in CPU time, over workers that compute nothing.

python -m benchmarks.gateway [--quick] [--json FILE] [--profile FILE]

The gateway is a process of its own; workers and clients share another. A load of short answers and
one of long answers give the cost of a request and of a token: the slope between them is a token.
A short answer has two tokens, one of each kind of worker, as every longer one begins.
"""

import argparse
import asyncio
import cProfile
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import msgspec
import uvloop

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
PROMPT = "The isthmus joins two lands. " * 36
HTTP_HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """CPU time of the gateway process."""

    door: str
    num_clients: int
    ms_per_request: float
    """Of a streamed answer without its tokens, connection kept."""
    us_per_token: float


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


class Gateway:
    """The process that is measured."""

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


async def measure(gateway: Gateway, door: str, *, num_clients: int, num_repeats: int) -> Figures:
    """Both loads, after a short one that warms the path.

    The least of a few repeats counts: what else runs on the machine only ever adds CPU time.
    """
    load = {"http": http_load, "grpc": grpc_load}[door]

    async def request_s(num_requests: int, max_tokens: int) -> float:
        before_s = await gateway.cpu_s()
        await load(
            gateway.addresses[door],
            num_clients=num_clients,
            num_requests=num_requests,
            max_tokens=max_tokens,
        )
        return (await gateway.cpu_s() - before_s) / num_requests

    await request_s(64, 8)
    num_long = max(8, 2 * num_clients)
    repeats = range(num_repeats)
    short_s = min([await request_s(256, SHORT_TOKENS) for _ in repeats])
    long_s = min([await request_s(num_long, LONG_TOKENS) for _ in repeats])
    token_s = (long_s - short_s) / (LONG_TOKENS - SHORT_TOKENS)
    return Figures(
        door=door,
        num_clients=num_clients,
        ms_per_request=round((short_s - SHORT_TOKENS * token_s) * 1e3, 3),
        us_per_token=round(token_s * 1e6, 2),
    )


async def serve(addresses: Sequence[str], profile: Path | None) -> None:
    """The child: a gateway over workers that run elsewhere, until standard input ends.

    Each line that comes in is answered with the CPU time so far.
    """
    workers: list[FakeWorker] = [FakePrefillWorker("p0"), FakeDecodeWorker("d0")]
    for worker, address in zip(workers, addresses, strict=True):
        worker.address = address
    profiler = cProfile.Profile() if profile is not None else None
    async with gateway_over_started(*workers, max_num_sequences=1024) as gateway:
        http_address = gateway.http_url.removeprefix("http://")
        print(json.dumps({"http": http_address, "grpc": gateway.grpc_address}), flush=True)
        if profiler is not None:
            profiler.enable()
        while await asyncio.to_thread(sys.stdin.readline):
            print(time.process_time(), flush=True)
        if profiler is not None:
            profiler.disable()
            profiler.dump_stats(str(profile))


async def main(*, quick: bool, profile: Path | None) -> list[Figures]:
    """Start workers here and the gateway as a child; measure both doors."""
    prefill, decode = FakePrefillWorker("p0"), FakeDecodeWorker("d0", step_s=STEP_S)
    figures = []
    async with running(prefill, decode):
        command = [sys.executable, "-m", "benchmarks.gateway"]
        command += ["--serve", prefill.address, decode.address]
        if profile is not None:
            command += ["--profile", str(profile)]
        child = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        async with Gateway(child) as gateway:
            for door, num_clients in itertools.product(gateway.addresses, (1, 8, 32)):
                found = await measure(
                    gateway, door, num_clients=num_clients, num_repeats=3 if quick else 9
                )
                print(
                    f"{door}  {num_clients:3d} clients  {found.ms_per_request:7.3f} ms/request"
                    f"  {found.us_per_token:7.2f} us/token",
                    flush=True,
                )
                figures.append(found)
    return figures


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="cProfile of the gateway")
    parser.add_argument("--serve", nargs=2, metavar="ADDRESS", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parsed(sys.argv[1:])
    if options.serve:
        uvloop.run(serve(options.serve, options.profile))
    else:
        results = uvloop.run(main(quick=options.quick, profile=options.profile))
        if options.json is not None:
            options.json.write_bytes(
                msgspec.json.format(msgspec.json.encode([asdict(row) for row in results]))
            )
