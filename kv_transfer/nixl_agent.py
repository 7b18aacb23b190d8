"""NIXL, where it is installed: one agent over UCX for the blocks of one pool.

No thread of its own makes progress: that would spin on a core for as long as the process lives.
Whoever waits for a transfer makes progress meanwhile, at both ends.

A read that has begun ends by itself or not at all. NIXL says that it lets a transfer be cancelled,
but UCX goes on with it: with nixl 1.5.1 over tcp, 64 MiB arrived after their handle was released.
"""

import importlib
import logging
import secrets
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import PeerUnavailableError
from kv_transfer.copying import Bytes, Offsets

logger = logging.getLogger(__name__)

_PACKAGES = ("nixl_cu12", "nixl_cu13")
_RDMA_DEVICES = Path("/sys/class/infiniband")

POLL_S = 50e-6
"""Between two looks at a transfer."""
RETRY_S = 0.2

Addresses = npt.NDArray[np.uint64]


def is_installed() -> bool:
    return any(find_spec(name) for name in _PACKAGES)


def has_rdma() -> bool:
    """There is a network card for which NIXL is worth its while."""
    return _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir())


class NixlAgent:
    """Blocks for a moment when it is made: UCX looks around, and the pool is registered."""

    def __init__(self, pool: Bytes) -> None:
        """`pool` stays where it is until `close`.

        Raises:
            PeerUnavailableError: NIXL is not installed, or cannot be used.
        """
        api = _api()
        self._base = pool.ctypes.data
        self._lock = threading.Lock()
        self._known: Counter[str] = Counter()
        self._is_stopped = threading.Event()
        try:
            self._agent: Any = api.nixl_agent(
                f"isthmus-{secrets.token_hex(8)}",
                api.nixl_agent_config(
                    enable_prog_thread=False,
                    backends=["UCX"],
                    sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
                ),
            )
            region = [(self._base, pool.nbytes, 0, "")]
            self._registered: Any = self._agent.register_memory(region, "DRAM")
        except Exception as error:
            raise PeerUnavailableError(f"NIXL cannot be used: {error}") from error
        self.metadata: bytes = self._agent.get_agent_metadata()
        """For the agents that shall read here."""

    def addresses(self, offsets: Offsets) -> Addresses:
        """Of places in the pool."""
        return (offsets + self._base).astype(np.uint64)

    def know(self, metadata: bytes) -> str:
        """A peer's name; raises PeerUnavailableError when NIXL makes nothing of it."""
        with self._lock:
            try:
                name: str = self._agent.add_remote_agent(metadata).decode()
            except Exception as error:
                raise PeerUnavailableError(f"NIXL does not know the peer: {error}") from error
            self._known[name] += 1
        return name

    def forget(self, name: str) -> None:
        """As often as it was known: a peer's new connection may come before its old one ends."""
        with self._lock:
            self._known[name] -= 1
            if not self._known[name]:
                del self._known[name]
                self._agent.remove_remote_agent(name)

    def read(
        self,
        name: str,
        addresses: Addresses,
        offsets: Offsets,
        lengths: Offsets,
    ) -> None:
        """Read runs of a peer's pool into this one; returns when nothing more is written.

        Nothing ends it early but `stop`: of a peer that is gone UCX tells in the end, and one that
        merely makes no progress may still send.

        Args:
            name: from `know`.
            addresses: of the runs there, as the peer gave them.
            offsets: of the runs here.
            lengths: in bytes.

        Raises:
            PeerUnavailableError: not all of it was read; nothing more is written, but after `stop`.
        """
        local, remote = (
            self._agent.get_xfer_descs(_rows(places, lengths), "DRAM")
            for places in (self.addresses(offsets), addresses)
        )
        try:
            transfer = self._agent.initialize_xfer("READ", local, remote, name)
        except Exception as error:
            raise PeerUnavailableError(f"NIXL: {error}") from error
        try:
            state = self._agent.transfer(transfer)
            while state == "PROC" and not self._is_stopped.wait(POLL_S):
                state = self._agent.check_xfer_state(transfer)
        except Exception as error:
            raise PeerUnavailableError(f"NIXL: {error}") from error
        finally:
            self._release(transfer)
        if state != "DONE":
            raise PeerUnavailableError(f"NIXL ended a transfer with {state}")

    def progress(self) -> None:
        """Serve peers that read here."""
        self._agent.get_new_notifs()

    def stop(self) -> None:
        """Reads end at once, though their bytes may still come; `close` follows. Any thread."""
        self._is_stopped.set()

    def close(self) -> None:
        """The pool is not written any more; no thread reads or makes progress."""
        self._agent.deregister_memory(self._registered)
        del self._agent

    def _release(self, transfer: Any) -> None:  # noqa: ANN401 - it has no types
        """NIXL refuses as long as the transfer is under way."""
        while True:
            try:
                self._agent.release_xfer_handle(transfer)
            except Exception:
                logger.exception("NIXL does not release a transfer")
                if self._is_stopped.wait(RETRY_S):
                    return
            else:
                return


def _rows(places: Addresses, lengths: Offsets) -> Addresses:
    """[N, 3]: address, bytes, device."""
    return np.stack([places, lengths.astype(np.uint64), np.zeros_like(places)], axis=1)


def _api() -> Any:  # noqa: ANN401 - it has no types
    for name in _PACKAGES:
        try:
            api = importlib.import_module(f"{name}._api")
        except ModuleNotFoundError:
            continue
        except ImportError as error:
            raise PeerUnavailableError(f"{name} cannot be loaded: {error}") from error
        logging.getLogger("nixl").setLevel(logging.WARNING)  # it would write to stdout
        return api
    raise PeerUnavailableError(
        "NIXL is not installed, which data_plane = nixl needs: pip install 'isthmus[nixl]'"
    )
