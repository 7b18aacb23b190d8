"""The address by which the rest of the mesh reaches this machine."""

import socket
from urllib.parse import urlsplit

WILDCARDS = frozenset({"0.0.0.0", "::", "[::]", "*", ""})
_DEFAULT_REDIS_PORT = 6379


def reachable_host(host: str, redis_url: str) -> str:
    """`host`, or for a wildcard the address of the interface on which Redis is reached.

    That is the network which the workers share, whatever other interfaces a container has. Nothing
    is sent: connecting a datagram socket only asks the kernel for its route.
    """
    if host not in WILDCARDS:
        return host
    parts = urlsplit(redis_url)
    if parts.scheme not in {"redis", "rediss"} or not parts.hostname:
        return "127.0.0.1"  # a unix socket: everybody is on this machine
    family, kind, protocol, _, address = socket.getaddrinfo(
        parts.hostname, parts.port or _DEFAULT_REDIS_PORT, type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
    return f"[{own}]" if family == socket.AF_INET6 else own
