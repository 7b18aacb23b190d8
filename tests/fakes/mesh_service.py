"""A service with the flags, ready file and drain of a real one, and no model behind it.

`python tests/fakes/mesh_service.py --role gateway [--fail TEXT] [--stubborn] [--log FILE] FLAGS`;
the standard library only, so that it starts at once. SIGUSR1 makes it crash.
"""

import argparse
import json
import os
import signal
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def options_from(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for flag in ("--role", "--model", "--redis-url", "--host", "--dtype", "--device", "--fail"):
        parser.add_argument(flag)
    for flag in ("--port", "--http-port", "--grpc-port", "--core-share-fd", "--core-share-slot"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--ready-file", type=Path)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--home-cores")
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


def main() -> None:
    options = options_from(sys.argv[1:])
    if options.fail:
        sys.exit(f"error: {options.fail}")
    if options.core_share_fd is not None:
        os.fstat(options.core_share_fd)  # inherited, or this raises

    def log(event: str) -> None:
        with options.log.open("a") as file:
            file.write(f"{options.role} {event}\n")

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
    log("stopped")


if __name__ == "__main__":
    main()
