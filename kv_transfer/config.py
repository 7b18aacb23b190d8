"""Settings of both ends of a handover."""

from dataclasses import dataclass
from enum import StrEnum


class DataPlane(StrEnum):
    """Which way the bytes take."""

    AUTO = "auto"
    """shm where both ends can, else nixl, else tcp."""
    SHM = "shm"
    TCP = "tcp"
    NIXL = "nixl"
    """Not part of auto on hosts without an RDMA card, where tcp is faster."""


class Checksums(StrEnum):
    """Where what was written is compared with what was to be written, before anyone reads it."""

    NETWORK = "network"
    """tcp: an xxh3 checksum with every frame."""
    ALWAYS = "always"
    """nixl: the same; shm: each slice is compared with its source once it is written."""
    NEVER = "never"


@dataclass(frozen=True, kw_only=True, slots=True)
class TransferConfig:
    """What a worker's operator may set about handovers."""

    data_plane: DataPlane = DataPlane.AUTO
    lease_s: float = 5.0
    """Asked for by the sender and the most the receiver grants at once; renewed while it works."""
    max_hold_s: float = 600.0
    """The receiver renews no lease beyond this age."""
    reserve_timeout_s: float = 60.0
    """How long a handover waits for blocks when the decode pool is full."""
    rpc_timeout_s: float = 5.0
    """For each of the other control calls."""
    data_timeout_s: float = 5.0
    """tcp: a peer that moves no byte for this long in the middle of a push is given up."""
    data_address: str = "127.0.0.1:0"
    """tcp, nixl: host:port that the receiver listens on; nixl takes the next port where both are
    offered. With a wildcard host, senders connect to the host under which they know the worker's
    gRPC server."""
    max_data_connections: int = 256
    """tcp: more are refused; each sending worker holds one or a few."""
    max_connections_per_peer: int = 4
    """tcp: a push of many MiB is spread over so many, but no more than half of the cores here."""
    tls_cert: str = ""
    """tcp: PEM files of this end's certificate, its key, and the authority that has signed both
    ends' certificates; all three or none. With them the data port speaks nothing but TLS."""
    tls_key: str = ""
    tls_ca: str = ""
    checksums: Checksums = Checksums.NETWORK
    """Of the sender. Damage is sent again once; then the handover fails."""
    slice_bytes: int = 4 << 20
    """shm: most bytes between two looks at the lease."""

    def __post_init__(self) -> None:
        for name, kind in (("data_plane", DataPlane), ("checksums", Checksums)):
            if not isinstance(getattr(self, name), kind):  # a plain string would compare unequal
                raise ValueError(f"{name} must be a {kind.__name__}, got {getattr(self, name)!r}")
        for name in (
            "lease_s",
            "max_hold_s",
            "reserve_timeout_s",
            "rpc_timeout_s",
            "data_timeout_s",
            "max_data_connections",
            "max_connections_per_peer",
            "slice_bytes",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        address_from(self.data_address)
        if self.is_secured and self.data_plane is DataPlane.NIXL:
            raise ValueError(f"data_plane nixl does not speak TLS, got tls_cert {self.tls_cert!r}")
        if len({bool(path) for path in (self.tls_cert, self.tls_key, self.tls_ca)}) > 1:
            raise ValueError(
                "tls_cert, tls_key and tls_ca belong together, got"
                f" {self.tls_cert!r}, {self.tls_key!r}, {self.tls_ca!r}"
            )

    @property
    def is_secured(self) -> bool:
        """The tcp data port speaks TLS."""
        return bool(self.tls_cert)


def join_address(host: str, port: int) -> str:
    """host:port, as `address_from` takes it apart."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_from(text: str) -> tuple[str, int]:
    """Split host:port; an IPv6 host stands in brackets.

    Raises:
        ValueError: it is not of this form.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and int(port) <= 65535):
        raise ValueError(f"expected host:port, got {text!r}")
    return host, int(port)
