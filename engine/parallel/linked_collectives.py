"""Collectives among CPUs of several hosts."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch._C._distributed_c10d import ProcessGroup

from engine.parallel.process_group import ProcessGroupCollectives, add_up
from engine.parallel.rank_links import RankLinks
from engine.parallel.store_watch import StoreWatch

logger = logging.getLogger(__name__)

_GATHERED_BYTES = 64 * 1024
"""More than two ranks share out the sum of more: two exchanges, of fewer bytes."""
_PROBE_BYTES = 512 * 1024
"""That a rank sends, to all others together."""
_NUM_PROBES = 5
_SLOW_S = 1e-3
"""An exchange of the probe that takes longer is worth hiding: one part more costs 0.3 ms of a core
for each exchange. 1 ms is 4 Gbit/s of a rank's link; over loopback two ranks take 0.4 ms."""


class LinkedCollectives(ProcessGroupCollectives):
    """gloo; but what all ranks exchange goes through `RankLinks`.

    gloo wakes up two threads for each exchange, on cores that compute: 0.2 to 4 ms against 10 us
    for a few bytes between two ranks of one host. Sums are in rank order, as in shared memory.
    """

    def __init__(
        self,
        group: ProcessGroup,
        links: RankLinks,
        ranks: Sequence[int],
        rank: int,
        watch: StoreWatch,
        *,
        title: str,
        timeout_s: float,
        is_probed: bool,
    ) -> None:
        """Own `links`; every rank of the group must come.

        Args:
            group: for broadcasts, barriers, and what two ranks send.
            links: for everything else.
            ranks: global.
            rank: global.
            watch: of the worker.
            title: names the group in errors.
            timeout_s: of each call.
            is_probed: find out whether sums are worth hiding; else they are not.
        """
        cpu = torch.device("cpu")
        super().__init__(
            "gloo", group, ranks, rank, watch, title=title, device=cpu, timeout_s=timeout_s
        )
        self._links = links
        self._others = [index for index in range(self._size) if index != self._rank]
        if is_probed:
            probe_s = self._probe_s()
            self.is_in_background = probe_s > _SLOW_S
            how = "in two parts that take turns" if self.is_in_background else "whole"
            logger.info("%s: %.2f ms an exchange; steps are computed %s", title, 1e3 * probe_s, how)

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], None]:
        if x.numel() == 0:
            return lambda: None
        if self._size == 2 or x.nbytes <= _GATHERED_BYTES:
            return self._begin_gathered_sum(x)
        return self._begin_shared_sum(x)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        parts = out.split(list(lengths))
        parts[self._rank].copy_(x)
        self._begin_parts("all_gather", [x] * self._size, parts)()

    def close(self) -> None:
        super().close()
        self._links.close()

    def _probe_s(self) -> float:
        """What the slowest rank's exchange takes, the same on all.

        A rank sends as many bytes however many ranks share them: a large sum is shared out, too.
        """
        x = torch.zeros(_PROBE_BYTES // len(self._others), dtype=torch.uint8)
        parts = [torch.empty_like(x) for _ in range(self._size)]
        best_s = math.inf
        for _ in range(_NUM_PROBES):
            start_s = time.perf_counter()
            self._begin_parts("probe", [x] * self._size, parts)()
            best_s = min(best_s, time.perf_counter() - start_s)
        times = torch.empty(self._size, dtype=torch.float64)
        self.all_gather(torch.tensor([best_s], dtype=torch.float64), times, [1] * self._size)
        return float(times.max())

    def _begin_gathered_sum(self, x: torch.Tensor) -> Callable[[], None]:
        """Every rank sends all of `x` to all others and adds up what comes."""
        parts = [x if index == self._rank else torch.empty_like(x) for index in range(self._size)]
        finish = self._begin_parts("all_reduce", [x] * self._size, parts)

        def finish_all_reduce() -> None:
            finish()
            add_up(parts, x)

        return finish_all_reduce

    def _begin_shared_sum(self, x: torch.Tensor) -> Callable[[], None]:
        """Every rank adds up a share, and all send their shares to all others."""
        borders = [x.numel() * index // self._size for index in range(self._size + 1)]
        shares = [x[start:end] for start, end in pairwise(borders)]
        own = shares[self._rank]
        parts = [own if share is own else torch.empty_like(own) for share in shares]
        finish = self._begin_parts("all_reduce", shares, parts)

        def finish_all_reduce() -> None:
            finish()
            add_up(parts, own)
            self._begin_parts("all_reduce", [own] * self._size, shares)()

        return finish_all_reduce

    def _begin_exchange(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> Callable[[], None]:
        sends, receives = x.split(list(send_lengths)), out.split(list(receive_lengths))
        receives[self._rank].copy_(sends[self._rank])
        return self._begin_parts(name, sends, receives)

    def _begin_parts(
        self, name: str, sends: Sequence[torch.Tensor], receives: Sequence[torch.Tensor]
    ) -> Callable[[], None]:
        """Exchange with every other rank; parts are in rank order, this rank's own stay."""
        going = {index: sends[index] for index in self._others}
        coming = {index: receives[index] for index in self._others}
        what = f"{name} {sends[0].dtype}"
        return self._begin(name, lambda: self._links.begin(what, going, coming))
