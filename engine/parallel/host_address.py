"""Under which address the ranks of other hosts reach this one."""

import ipaddress
import socket

from torch._C._distributed_c10d import Store


def agreed_address(store: Store, rank: int, num_ranks: int, *, master_address: str) -> str:
    """Ask the routes, with the help of ranks on other hosts; every rank must call this.

    A host often knows its own name as a loopback address (Debian's 127.0.1.1), and so do the ranks
    that run where MASTER_ADDR points to: they look towards a rank that came from elsewhere.

    Args:
        store: of all ranks.
        rank: global.
        num_ranks: of the worker.
        master_address: where all of them meet.

    Raises:
        DistNetworkError: the store is lost.
        DistStoreError: a rank has not even come here.
        OSError: `master_address` has no route.
        ValueError: a rank says something that is no address.
    """
    own = address_towards(master_address)
    store.set(_key(rank), own)
    if not ipaddress.ip_address(own).is_loopback:
        return own
    for other in range(num_ranks):
        said = ipaddress.ip_address(store.get(_key(other)).decode(errors="replace"))
        if not said.is_loopback:
            return address_towards(str(said))
    return own  # all are on this host


def address_towards(host: str) -> str:
    """The address of this host that `host` can reach, as the routes say; sends nothing."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        own: str = probe.getsockname()[0]
        return own


def _key(rank: int) -> str:
    return f"address/{rank}"
