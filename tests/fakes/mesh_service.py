"""A service with the flags, ready file and drain of a real one, and no model behind it.

`python tests/fakes/mesh_service.py --role gateway [--fail TEXT] [--log FILE] FLAGS...`; the
standard library only, so that it starts at once.
"""

import argparse
import json
import os
import signal
import socket
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    for flag in ("--role", "--model", "--redis-url", "--host", "--dtype", "--device"):
        parser.add_argument(flag)
    for flag in ("--ready-file", "--log"):
        parser.add_argument(flag, type=Path)
    for flag in ("--port", "--http-port", "--grpc-port", "--core-share-fd"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--home-cores")
    parser.add_argument("--fail")
    parser.add_argument("--stubborn", action="store_true")
    options = parser.parse_args()
    if options.fail:
        sys.exit(f"error: {options.fail}")
    if options.core_share_fd is not None:
        os.fstat(options.core_share_fd)  # inherited, or this raises

    def log(event: str) -> None:
        if options.log:
            with options.log.open("a") as file:
                file.write(f"{options.role} {event}\n")

    stop = signal.sigwait
    signals = {signal.SIGTERM, signal.SIGUSR1}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    ports = (
        {"http": options.http_port, "grpc": options.grpc_port}
        if options.role == "gateway"
        else {"grpc": options.port}
    )
    sockets = {kind: socket.create_server((options.host, port)) for kind, port in ports.items()}
    addresses = {
        kind: "{}:{}".format(*listener.getsockname()) for kind, listener in sockets.items()
    }
    record = {"role": options.role, "pid": os.getpid(), "addresses": addresses}
    partial = options.ready_file.with_suffix(".tmp")
    partial.write_text(json.dumps(record))
    partial.replace(options.ready_file)
    log("serving")
    while True:
        if stop(signals) == signal.SIGUSR1:
            os._exit(3)
        log("draining")
        if not options.stubborn:
            break
    log("stopped")


if __name__ == "__main__":
    main()
