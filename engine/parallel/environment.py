"""Where this process stands among the ranks: torch.distributed's standard environment.

torchrun, LeaderWorkerSet or our launcher set it.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from engine.errors import CollectiveTimeoutError
from engine.parallel.layout import ParallelLayout


@dataclass(frozen=True, kw_only=True, slots=True)
class RankEnvironment:
    """One process's place, and where the ranks meet."""

    rank: int
    """Global: 0 is the one that serves."""
    world_size: int
    local_rank: int
    """Among the ranks of this host; chooses the CUDA device."""
    master_address: str
    master_port: int
    is_store_elsewhere: bool = False
    """The launcher keeps the store (torchrun's agent does); else rank 0 does."""
    attempt: int = 0
    """Counts restarts by the launcher, so that they do not read each other's keys."""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"RANK must be in [0, WORLD_SIZE={self.world_size}), got {self.rank}")
        if self.local_rank < 0:
            raise ValueError(f"LOCAL_RANK must not be negative, got {self.local_rank}")
        if not 0 < self.master_port < 65536:
            raise ValueError(f"MASTER_PORT must be in [1, 65535], got {self.master_port}")

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> "RankEnvironment | None":
        """Read RANK and its companions; None where RANK is not set: a process on its own.

        Raises:
            ValueError: a variable is missing or not a number; the text names it.
        """
        if "RANK" not in environment:
            return None
        if "MASTER_ADDR" not in environment:
            raise ValueError("RANK is set, but MASTER_ADDR is not: set it to the host of rank 0")
        return cls(
            rank=_number(environment, "RANK"),
            world_size=_number(environment, "WORLD_SIZE"),
            local_rank=_number(environment, "LOCAL_RANK", "0"),
            master_address=environment["MASTER_ADDR"],
            master_port=_number(environment, "MASTER_PORT"),
            is_store_elsewhere=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=_number(environment, "TORCHELASTIC_RESTART_COUNT", "0"),
        )

    def variables(self) -> dict[str, str]:
        """What a launcher sets so that `read` finds this."""
        variables = {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
            "TORCHELASTIC_RESTART_COUNT": str(self.attempt),
        }
        if self.is_store_elsewhere:
            variables["TORCHELASTIC_USE_AGENT_STORE"] = "True"
        return variables

    def check_layout(self, layout: ParallelLayout) -> None:
        """Raise ValueError unless the layout has just as many ranks as were started."""
        if self.world_size != layout.num_ranks:
            raise ValueError(
                f"WORLD_SIZE is {self.world_size}, but the layout {layout} has {layout.num_ranks} "
                f"ranks: start {layout.num_ranks} processes, or give a layout of {self.world_size}"
            )

    def open_store(self, timeout_s: float) -> Store:
        """Connect to the store, or start it on rank 0, and take this rank's place in it.

        Raises:
            ValueError: the place or the port is taken, as when two workers have one address.
            CollectiveTimeoutError: nobody answers there within `timeout_s`.
        """
        address = f"{self.master_address}:{self.master_port}"
        is_keeper = self.rank == 0 and not self.is_store_elsewhere
        try:
            store = TCPStore(
                self.master_address,
                self.master_port,
                is_master=is_keeper,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
            )
        except RuntimeError as error:  # torch's own errors, of many lines
            reason = str(error).partition("\n")[0]
            if is_keeper:
                raise ValueError(
                    f"rank 0 cannot keep the ranks' store on {address}: {reason}; is the port "
                    "another worker's? Each needs a MASTER_PORT of its own"
                ) from error
            text = f"rank {self.rank} did not find its rank 0 on {address}: {reason}"
            raise CollectiveTimeoutError(text, rank=0, operation="join") from error
        shared = PrefixStore(f"isthmus/{self.attempt}", store)
        self._take_place(shared, address)
        return shared

    def _take_place(self, store: Store, address: str) -> None:
        """Two workers with one address would otherwise share ranks."""
        own = f"process {os.getpid()} on {socket.gethostname()} with WORLD_SIZE {self.world_size}"
        # The store hands numbers out: who draws the first has the place.
        is_first = store.add(f"taken/{self.rank}/count", 1) == 1
        if is_first:
            store.set(f"taken/{self.rank}", own)
            return
        theirs = store.get(f"taken/{self.rank}").decode(errors="replace")
        raise ValueError(
            f"rank {self.rank} of the worker at {address} is {theirs}, so it cannot be {own}: give "
            "each worker a MASTER_PORT of its own, and start the ranks of one all together"
        )


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None:
        raise ValueError(f"RANK is set, but {name} is not")
    if not text.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {text!r}")
    return int(text)
