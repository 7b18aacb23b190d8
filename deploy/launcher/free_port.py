"""Says at once that a port is taken, before any model is loaded."""

import socket


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
