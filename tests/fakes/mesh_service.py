"""A service with the flags, ready file and drain of a real one, and no model behind it.

`python tests/fakes/mesh_service.py --role gateway [--fail TEXT] [--stubborn] [--log FILE] FLAGS`;
the standard library only, so that it starts at once. SIGUSR1 makes it crash. With RANK above 0 it
connects to rank 0 at MASTER_PORT and ends when rank 0 does; `--fail-rank` fails on that rank only.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in (
        "--role",
        "--model",
        "--redis-url",
        "--host",
        "--dtype",
        "--kv-dtype",
        "--device",
        "--fail",
    ):
        parser.add_argument(flag)
    for flag in ("--port", "--http-port", "--grpc-port", "--core-share-fd", "--fail-rank"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--parallel")
    parser.add_argument("--drain-grace-s", type=float)
    parser.add_argument("--stubborn", action="store_true")
    return parser.parse_args(arguments)


class StatusPage(BaseHTTPRequestHandler):
    """GET /status: the workers that are ready, found by their ready files."""

    folder: Path

    def do_GET(self) -> None:
        workers = [
            {"role": file.name.partition("-")[0], "is_connected": True}
            for file in self.folder.glob("*-[0-9]*.json")
        ]
        body = json.dumps({"workers": workers}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def listen(options: argparse.Namespace) -> tuple[dict[str, str], list[socket.socket]]:
    """Addresses by kind, and what keeps them taken."""
    if options.role != "gateway":
        grpc = socket.create_server((options.host, options.port))
        return {"grpc": address_of(grpc)}, [grpc]
    grpc = socket.create_server((options.host, options.grpc_port))
    page = type("Page", (StatusPage,), {"folder": options.ready_file.parent})
    server = ThreadingHTTPServer((options.host, options.http_port), page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return {"http": address_of(server.socket), "grpc": address_of(grpc)}, [grpc, server.socket]


def address_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()
    return f"{host}:{port}"


def follow() -> None:
    """A rank above 0: say that it is there, end with rank 0."""
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    while True:
        try:
            leader = socket.create_connection(address)
        except ConnectionRefusedError:
            time.sleep(0.01)  # rank 0 does not listen yet
        else:
            break
    leader.sendall(b"here")
    sys.exit(1 if leader.recv(16) != b"stop" else 0)


def followers_here() -> list[socket.socket]:
    """Rank 0 of several: connections of all others."""
    num_followers = int(os.environ.get("WORLD_SIZE", "1")) - 1
    if not num_followers:
        return []
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    with socket.create_server(address) as server:
        return [server.accept()[0] for _ in range(num_followers)]


def main() -> None:
    options = options_from(sys.argv[1:])
    rank = int(os.environ.get("RANK", "0"))
    if options.fail and rank == (options.fail_rank or 0):
        sys.exit(f"error: {options.fail}")
    if options.core_share_fd is not None:
        os.fstat(options.core_share_fd)  # inherited, or this raises

    def log(event: str) -> None:
        with options.log.open("a") as file:
            file.write(f"{options.role} {event}\n")

    if rank > 0:
        log(f"rank {rank} cores {os.environ['ISTHMUS_WORKER__HOME_CORES']}")
        follow()
    followers = followers_here()
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    addresses, _listeners = listen(options)
    partial = options.ready_file.with_suffix(".tmp")
    partial.write_text(
        json.dumps({"role": options.role, "pid": os.getpid(), "addresses": addresses})
    )
    log("serving")
    partial.replace(options.ready_file)
    while True:
        if signal.sigwait(signals) == signal.SIGUSR1:
            os._exit(3)
        log("draining")
        if not options.stubborn:
            break
    for follower in followers:
        follower.sendall(b"stop")
    log("stopped")


if __name__ == "__main__":
    main()
