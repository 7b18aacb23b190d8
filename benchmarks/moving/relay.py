"""Passes TCP connections on to another host, late and badly: what a test of slow links needs.

python -m benchmarks.moving.relay TARGET_HOST GRPC_PORT DATA_PORT [--delay-ms 10]
    [--fault stall|cut|flip] [--after-bytes N] [--stall-s 2]

Listens on the same ports of this host and prints a line when it does. The fault meets the first
data connection that has sent so many bytes, once.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass

PIECE_BYTES = 64 << 10
MAX_QUEUED_PIECES = 64
"""Between its two ends: some MiB, as routers have."""


@dataclass(slots=True)
class Fault:
    """What happens to the sender's bytes, and where."""

    kind: str
    after_bytes: int
    stall_s: float

    async def meet(self, data: bytearray, num_before: int) -> None:
        """Let it happen if it lies in this piece; raises ConnectionAbortedError for a cut."""
        place = self.after_bytes - num_before
        if not self.kind or not 0 <= place < len(data):
            return
        kind, self.kind = self.kind, ""
        if kind == "flip":
            data[place] ^= 1
        elif kind == "stall":
            await asyncio.sleep(self.stall_s)
        else:
            raise ConnectionAbortedError("cut")


NO_FAULT = Fault("", 0, 0.0)


async def pass_on(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, delay_s: float, fault: Fault
) -> None:
    """Each piece leaves `delay_s` after it came; the rate is the links'."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[tuple[float, bytearray]] = asyncio.Queue(MAX_QUEUED_PIECES)

    async def take() -> None:
        while data := await source.read(PIECE_BYTES):
            await queue.put((loop.time() + delay_s, bytearray(data)))
        await queue.put((loop.time() + delay_s, bytearray()))

    async with asyncio.TaskGroup() as tasks:
        taking = tasks.create_task(take())
        num_bytes = 0
        try:
            while True:
                due_s, data = await queue.get()
                await asyncio.sleep(max(0.0, due_s - loop.time()))
                if not data:
                    return
                await fault.meet(data, num_bytes)
                num_bytes += len(data)
                target.write(data)
                await target.drain()
        except OSError:
            return
        finally:
            taking.cancel()
            target.close()


async def relay(host: str, ports: Sequence[int], delay_s: float, fault: Fault) -> None:
    """Serve until stdin closes; the last port is the one that the fault is for."""

    async def serve(port: int) -> asyncio.Server:
        async def connect(near: asyncio.StreamReader, near_end: asyncio.StreamWriter) -> None:
            far, far_end = await asyncio.open_connection(host, port)
            mine = fault if port == ports[-1] else NO_FAULT
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(pass_on(near, far_end, delay_s, mine))
                tasks.create_task(pass_on(far, near_end, delay_s, NO_FAULT))

        return await asyncio.start_server(connect, "127.0.0.1", port)

    servers = [await serve(port) for port in ports]
    print("relaying", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    for server in servers:
        server.close()


def main(arguments: Sequence[str]) -> None:
    """Until stdin closes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.moving.relay")
    parser.add_argument("host")
    parser.add_argument("ports", type=int, nargs=2)
    parser.add_argument("--delay-ms", type=float, default=10.0)
    parser.add_argument("--fault", choices=("", "stall", "cut", "flip"), default="")
    parser.add_argument("--after-bytes", type=int, default=0)
    parser.add_argument("--stall-s", type=float, default=2.0)
    options = parser.parse_args(arguments)
    fault = Fault(options.fault, options.after_bytes, options.stall_s)
    asyncio.run(relay(options.host, options.ports, options.delay_ms / 1e3, fault))


if __name__ == "__main__":
    main(sys.argv[1:])
