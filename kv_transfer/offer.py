"""What the two ends tell each other in a handshake, and how they are compared."""

from dataclasses import dataclass

from engine.errors import LayoutMismatchError
from engine.kv_cache.layout import KvLayout

PROTOCOL_VERSION = 1


@dataclass(frozen=True, slots=True)
class ShmOffer:
    """Where a process on the same host finds the receiver's pool."""

    path: str
    num_bytes: int
    nonce: bytes


@dataclass(frozen=True, slots=True)
class TcpOffer:
    """Where the receiver's data listener is; a wildcard host means that of its gRPC server."""

    host: str
    port: int


@dataclass(frozen=True, slots=True)
class Offer:
    """The receiver's answer to a handshake."""

    receiver_id: str
    epoch: int
    layout: KvLayout
    num_blocks: int
    shm: ShmOffer | None
    tcp: TcpOffer | None


def check_same(
    theirs: tuple[int, str, KvLayout], ours: tuple[int, str, KvLayout], *, names: tuple[str, str]
) -> None:
    """Compare (protocol version, model digest, layout) of two ends.

    Raises:
        LayoutMismatchError: they differ; the text shows both.
    """
    if theirs != ours:
        raise LayoutMismatchError(
            " but ".join(
                f"{name} has protocol {version}, model {digest or 'unnamed'}, {layout}"
                for name, (version, digest, layout) in zip(names, (theirs, ours), strict=True)
            )
        )
