"""What the two ends tell each other in a handshake, and how they are compared."""

from dataclasses import dataclass, replace
from typing import TypeVar

from engine.errors import LayoutMismatchError
from engine.kv_cache.layout import KvLayout
from kv_transfer.group_layout import GroupLayout

PROTOCOL_VERSION = 5
WILDCARD_HOSTS = frozenset({"0.0.0.0", "::"})


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
    is_secured: bool = False
    """It speaks TLS only."""


@dataclass(frozen=True, slots=True)
class NixlOffer:
    """Where the receiver is told what to read; a wildcard host as in `TcpOffer`."""

    host: str
    port: int


Located = TypeVar("Located", TcpOffer, NixlOffer)


@dataclass(frozen=True, slots=True)
class RankOffer:
    """The data planes of one receiving rank; None where it has none."""

    shm: ShmOffer | None
    tcp: TcpOffer | None
    nixl: NixlOffer | None = None

    def at_host(self, host: str) -> "RankOffer":
        """With `host` where a data plane listens on all addresses."""

        def placed(offer: Located | None) -> Located | None:
            if offer is None or offer.host not in WILDCARD_HOSTS:
                return offer
            return replace(offer, host=host)

        return replace(self, tcp=placed(self.tcp), nixl=placed(self.nixl))


@dataclass(frozen=True, slots=True)
class Offer:
    """The receiver's answer to a handshake."""

    receiver_id: str
    epoch: int
    layout: GroupLayout
    num_blocks: int
    """In every rank's pool."""
    ranks: tuple[RankOffer, ...]

    def rank_name(self, rank: int) -> str:
        """For texts: the worker, and which of its ranks when it has several."""
        return self.receiver_id if len(self.ranks) == 1 else f"rank {rank} of {self.receiver_id}"


def check_same(
    theirs: tuple[int, str, KvLayout], ours: tuple[int, str, KvLayout], *, names: tuple[str, str]
) -> None:
    """Compare (protocol version, model digest, full layout) of two ends.

    Blocks may differ in size: tokens are cut at the borders of both.

    Raises:
        LayoutMismatchError: they differ; the text shows both.
    """
    if theirs[:2] != ours[:2] or _cell(theirs[2]) != _cell(ours[2]):
        raise LayoutMismatchError(
            " but ".join(
                f"{name} has protocol {version}, model {digest or 'unnamed'}, {layout}"
                for name, (version, digest, layout) in zip(names, (theirs, ours), strict=True)
            )
        )


def _cell(layout: KvLayout) -> KvLayout:
    return replace(layout, block_size_tokens=1)
