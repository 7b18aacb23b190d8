"""Collectives over torch.distributed's process groups: gloo between hosts, NCCL on CUDA."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, ProcessGroup, Work

from engine.parallel.store_watch import STALE_S, StoreWatch
from engine.parallel.verdict import Verdict, VerdictKind

_WIDENED = frozenset({torch.float16, torch.bfloat16})
_FOREVER_S = 10.0 * 365 * 86400
_SLICE_S = 0.05
_GRACE_S = 1.0
"""The process group's own time-out comes first; this is for when it does not."""

Begin = Callable[[], Work]


class ProcessGroupCollectives:
    """Each call is one or two of the process group's own; bytes travel as uint8.

    Gloo cannot be woken, so a helper thread waits for it while the caller looks for trouble. NCCL
    only queues work on the stream; its own watchdog ends the process when that takes too long.
    """

    def __init__(
        self,
        name: str,
        group: ProcessGroup,
        ranks: Sequence[int],
        rank: int,
        watch: StoreWatch,
        *,
        title: str,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """`ranks` and `rank` are global; `title` names the group in errors."""
        self.name = name
        self._group = group
        self._ranks = tuple(ranks)
        self._global_rank = rank
        self._rank = self._ranks.index(rank)
        self._size = len(ranks)
        self._watch = watch
        self._title = title
        self._device = device
        self._timeout_s = timeout_s
        self._work: queue.SimpleQueue[tuple[Begin, _Outcome] | None] = queue.SimpleQueue()
        if device.type == "cuda":
            return  # waits are in the stream, which is the calling thread's
        self._helper = threading.Thread(target=self._help, name=f"{name}-{title}", daemon=True)
        self._helper.start()

    def all_reduce(self, x: torch.Tensor) -> None:
        if x.numel() == 0:
            return
        wide = x.float() if x.dtype in _WIDENED else x
        self._do("all_reduce", lambda: self._group.allreduce([wide], AllreduceOptions()))
        if wide is not x:
            x.copy_(wide)

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        if longest == 0:
            return
        padded = x
        if x.numel() < longest:
            padded = x.new_zeros(longest)
            padded[: x.numel()] = x
        parts = x.new_empty(self._size, longest)
        outputs = [[part.view(torch.uint8) for part in parts]]
        self._do("all_gather", lambda: self._group.allgather(outputs, [padded.view(torch.uint8)]))
        start = 0
        for part, length in zip(parts, lengths, strict=True):
            out[start : start + length] = part[:length]
            start += length

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        own = lengths[self._rank]
        parts = x.new_empty(self._size, own)
        self._exchange("reduce_scatter", x, parts.view(-1), lengths, [own] * self._size)
        wide = torch.float32 if x.dtype in _WIDENED else x.dtype
        total = parts[0].to(wide)
        for part in parts[1:]:
            total = total + part
        out.copy_(total)

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        self._exchange("all_to_all", x, out, send_lengths, receive_lengths)

    def broadcast(self, x: torch.Tensor, source: int, *, timeout_s: float | None = None) -> None:
        if x.numel() == 0:
            return
        timeout_s = min(self._timeout_s if timeout_s is None else timeout_s, _FOREVER_S)
        options = BroadcastOptions()
        options.rootRank = source
        options.timeout = timedelta(seconds=timeout_s)
        data = x.view(torch.uint8)
        self._do("broadcast", lambda: self._group.broadcast([data], options), timeout_s)

    def send(self, x: torch.Tensor, to: int) -> None:
        if x.numel():
            data = x.view(torch.uint8)
            self._do("send", lambda: self._group.send([data], to, 0), partner=to)

    def receive(self, x: torch.Tensor, source: int) -> None:
        if x.numel():
            data = x.view(torch.uint8)
            self._do("receive", lambda: self._group.recv([data], source, 0), partner=source)

    def barrier(self) -> None:
        token = torch.zeros(1, device=self._device)
        self._do("barrier", lambda: self._group.allreduce([token], AllreduceOptions()))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self._work.put(None)  # a helper that is stuck goes with the process

    def _exchange(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        item = x.element_size()
        receives = [length * item for length in receive_lengths]
        sends = [length * item for length in send_lengths]
        sent, received = x.view(torch.uint8), out.view(torch.uint8)
        self._do(name, lambda: self._group.alltoall_base(received, sent, receives, sends))

    def _do(
        self,
        name: str,
        begin: Begin,
        timeout_s: float | None = None,
        *,
        partner: int | None = None,
    ) -> None:
        """Run one operation to its end.

        Args:
            name: of the operation.
            begin: starts it; called on the helper thread.
            timeout_s: in place of the configured one.
            partner: the only rank that can be to blame.
        """
        operation = f"{self._title} {name}"
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        if verdict := self._watch.verdict():
            raise verdict.error(operation, self._timeout_s)
        calls = self._watch.num_calls
        if partner is None:
            calls[self._title] = calls.get(self._title, 0) + 1
        outcome = _Outcome()
        deadline_s = time.monotonic() + timeout_s + _GRACE_S
        if self._device.type == "cuda":
            _wait(begin, outcome)
        else:
            self._work.put((begin, outcome))
        while not outcome.is_over.wait(_SLICE_S):
            if verdict := self._watch.verdict():
                raise verdict.error(operation, self._timeout_s)
            if time.monotonic() > deadline_s:
                outcome.error = TimeoutError("Timed out")
                break
        if outcome.error is not None:
            ranks = self._ranks if partner is None else [self._ranks[partner]]
            verdict = self._verdict_on(outcome.error, ranks)
            raise verdict.error(operation, self._timeout_s) from outcome.error

    def _verdict_on(self, error: Exception, ranks: Sequence[int]) -> Verdict:
        """Who is to blame for a failed operation; told to all ranks."""
        is_late = "Timed out" in str(error)
        end_s = time.monotonic() + STALE_S + _GRACE_S
        verdict = self._watch.verdict()
        while verdict is None:
            lost = self._watch.lost(ranks) or self._watch.lost(self._ranks)
            if is_late:
                rank = lost.rank if lost else self._watch.last(ranks, self._title)
                if rank is None and len(ranks) == 1:
                    rank = ranks[0]
                verdict = Verdict(VerdictKind.TIMED_OUT, rank)
            elif lost or time.monotonic() > end_s:
                verdict = lost or Verdict(VerdictKind.DEAD, None)
            else:
                time.sleep(_SLICE_S)
                verdict = self._watch.verdict()
                continue
            self._watch.post(verdict)
        return verdict

    def _help(self) -> None:
        while item := self._work.get():
            _wait(*item)
            del item  # not kept until the next one comes


class _Outcome:
    def __init__(self) -> None:
        self.is_over = threading.Event()
        self.error: Exception | None = None


def _wait(begin: Begin, outcome: _Outcome) -> None:
    try:
        begin().wait()
    except RuntimeError as error:  # torch's own; theirs have no common class beneath
        outcome.error = error
    outcome.is_over.set()
