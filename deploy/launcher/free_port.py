"""Ports: whether one is taken, before any model is loaded, and one that is kept for later."""

import socket
from contextlib import ExitStack


def check_port(host: str, port: int, *, flag: str) -> None:
    """Raise ValueError, naming `flag`, if `port` cannot be bound; 0 always can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"{flag} {port} cannot be used ({error.strerror});"
                " choose another port, or 0 for a free one"
            ) from error


def reserve_port(host: str, until: ExitStack) -> int:
    """Choose a free port and keep others from it; who shares addresses (SO_REUSEADDR) can listen.

    The reservation is a socket that is bound and does not listen, closed with `until`.
    """
    holder = until.enter_context(socket.socket())
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((host, 0))
    port: int = holder.getsockname()[1]
    return port
