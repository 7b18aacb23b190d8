"""Collectives over torch.distributed's process groups: gloo between hosts, NCCL on CUDA."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
from torch._C._distributed_c10d import AllreduceOptions, BroadcastOptions, ProcessGroup, Work

from engine.parallel.collectives import shift_lengths
from engine.parallel.outbox import FLUSH_S
from engine.parallel.rank_links import Exchange, OtherCallError
from engine.parallel.store_watch import STALE_S, StoreWatch
from engine.parallel.verdict import Verdict, VerdictKind

WIDENED = frozenset({torch.float16, torch.bfloat16})
_FOREVER_S = 10.0 * 365 * 86400
_SLICE_S = 0.05
_LATE = "Timed out"
"""Stands in gloo's error when its own time-out is over."""
_GRACE_S = 1.0
"""The process group's own time-out comes first; this is for when it does not."""

Begin = Callable[[], Work | Exchange]


class ProcessGroupCollectives:
    """Each call is one or two of the process group's own; bytes travel as uint8.

    Waits are cut into slices, with a look for trouble after each. NCCL only queues work on the
    stream; its own watchdog ends the process when that takes too long.
    """

    is_in_background = False  # NCCL could; whether that pays on GPUs was not measured

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
        self._helpers: dict[str, _Helper] = {}
        """Threads that wait for sends, and for receives."""
        self._sends: deque[tuple[_Transfer, int]] = deque()

    def all_reduce(self, x: torch.Tensor) -> None:
        self.begin_all_reduce(x)()

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], None]:
        if x.numel() == 0:
            return lambda: None
        wide = x.float() if x.dtype in WIDENED else x
        options = AllreduceOptions()
        finish = self._begin("all_reduce", lambda: self._group.allreduce([wide], options))

        def finish_all_reduce() -> None:
            finish()
            if wide is not x:
                x.copy_(wide)

        return finish_all_reduce

    def all_gather(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        longest = max(lengths)
        if longest == 0:
            return
        padded = x
        if x.numel() < longest:
            padded = x.new_zeros(longest)
            padded[: x.numel()] = x
        found = x.new_empty(self._size, longest)
        outputs = [[each.view(torch.uint8) for each in found]]
        self._do("all_gather", lambda: self._group.allgather(outputs, [padded.view(torch.uint8)]))
        for part, each in zip(out.split(list(lengths)), found, strict=True):
            part.copy_(each[: len(part)])

    def reduce_scatter(self, x: torch.Tensor, out: torch.Tensor, lengths: Sequence[int]) -> None:
        own = lengths[self._rank]
        parts = x.new_empty(self._size, own)
        self._exchange("reduce_scatter", x, parts.view(-1), lengths, [own] * self._size)
        add_up(list(parts), out)

    def all_to_all(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        self._exchange("all_to_all", x, out, send_lengths, receive_lengths)

    def begin_shift(self, x: torch.Tensor, out: torch.Tensor) -> Callable[[], None]:
        sends, receives = shift_lengths(x, out, self._rank, self._size)
        return self._begin_exchange("shift", x, out, sends, receives)

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
        if x.numel() == 0:
            return
        data = x.view(torch.uint8)

        def begin() -> Work:
            return self._group.send([data], to, 0)

        if self._device.type == "cuda":
            self._do("send", begin, partner=to)
            return
        operation = f"{self._title} send"
        if verdict := self._watch.verdict():
            raise verdict.error(operation, self._timeout_s)
        while self._sends and self._sends[0][0].is_over.is_set():
            sent, receiver = self._sends.popleft()
            if sent.error is not None:
                verdict = self._verdict_on(sent.error, [self._ranks[receiver]])
                raise verdict.error(operation, self._timeout_s) from sent.error
        self._sends.append((_Transfer(self._helper("send"), begin), to))

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
        end_s = time.monotonic() + FLUSH_S
        for sent, _ in self._sends:
            if self._watch.verdict() is None:
                sent.is_over.wait(max(0.0, end_s - time.monotonic()))
        for helper in self._helpers.values():
            helper.put(None)  # one that is stuck goes with the process

    def _exchange(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> None:
        self._begin_exchange(name, x, out, send_lengths, receive_lengths)()

    def _begin_exchange(
        self,
        name: str,
        x: torch.Tensor,
        out: torch.Tensor,
        send_lengths: Sequence[int],
        receive_lengths: Sequence[int],
    ) -> Callable[[], None]:
        item = x.element_size()
        receives = [length * item for length in receive_lengths]
        sends = [length * item for length in send_lengths]
        sent, received = x.view(torch.uint8), out.view(torch.uint8)
        return self._begin(name, lambda: self._group.alltoall_base(received, sent, receives, sends))

    def _do(
        self,
        name: str,
        begin: Begin,
        timeout_s: float | None = None,
        *,
        partner: int | None = None,
    ) -> None:
        """Run one operation to its end; arguments as of `_begin`."""
        self._begin(name, begin, timeout_s, partner=partner)()

    def _begin(
        self,
        name: str,
        begin: Begin,
        timeout_s: float | None = None,
        *,
        partner: int | None = None,
    ) -> Callable[[], None]:
        """Start one operation; the function returned waits for its end.

        Args:
            name: of the operation.
            begin: starts it.
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
        deadline_s = time.monotonic() + timeout_s + _GRACE_S
        ranks = self._ranks if partner is None else (self._ranks[partner],)
        is_threaded = partner is not None and self._device.type != "cuda"
        with self._blaming(ranks, operation):
            work = _Transfer(self._helper(name), begin) if is_threaded else begin()

        def finish() -> None:
            with self._blaming(ranks, operation):
                if isinstance(work, Work) and self._device.type == "cuda":
                    work.wait()  # the stream's wait, not this thread's
                    return
                while not _is_over(work):
                    if verdict := self._watch.verdict():
                        raise verdict.error(operation, self._timeout_s)
                    if time.monotonic() > deadline_s:
                        raise TimeoutError(_LATE)

        return finish

    @contextmanager
    def _blaming(self, ranks: Sequence[int], operation: str) -> Iterator[None]:
        """Turn what torch raises into the verdict on one of `ranks`."""
        try:
            yield
        except OtherCallError as error:
            reason = f"{operation}: rank {self._ranks[error.index]} is in another call: {error}"
            self._watch.post(Verdict(VerdictKind.ABORTED, self._global_rank, reason))
            verdict = self._verdict_on(error, ranks)
            raise verdict.error(operation, self._timeout_s) from error
        except (RuntimeError, OSError) as error:  # torch's own have no common class beneath
            verdict = self._verdict_on(error, ranks)
            raise verdict.error(operation, self._timeout_s) from error

    def _verdict_on(self, error: Exception, ranks: Sequence[int]) -> Verdict:
        """Who is to blame for a failed operation; told to all ranks."""
        is_late = _LATE in str(error)
        end_s = time.monotonic() + STALE_S + _GRACE_S
        while (verdict := self._watch.verdict()) is None:
            lost = self._watch.lost(ranks) or self._watch.lost(self._ranks)
            if lost is None and not is_late and time.monotonic() < end_s:
                time.sleep(_SLICE_S)  # whoever broke the connection shows in a moment
            elif is_late and (lost is None or lost.kind is VerdictKind.DEAD):
                rank = lost.rank if lost else self._watch.last(ranks, self._title)
                only = ranks[0] if len(ranks) == 1 else None
                self._watch.post(Verdict(VerdictKind.TIMED_OUT, only if rank is None else rank))
            else:
                self._watch.post(lost or Verdict(VerdictKind.DEAD, None))
        return verdict

    def _helper(self, name: str) -> "_Helper":
        """The thread that waits for all sends, or for all receives, started with the first."""
        helper = self._helpers.get(name)
        if helper is None:
            helper = self._helpers[name] = queue.SimpleQueue()
            threading.Thread(
                target=_carry,
                args=(helper,),
                name=f"{self.name}-{self._title}-{name}",
                daemon=True,
            ).start()
        return helper


def add_up(parts: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """Sum in rank order; 16-bit numbers in float32, rounded once. `out` may be one of them."""
    if len(parts) == 2:
        torch.add(parts[0], parts[1], out=out)  # torch adds in float32, too
        return
    total = parts[0].float() if out.dtype in WIDENED else parts[0]
    for part in parts[1:]:
        total = total + part
    out.copy_(total)


class _Transfer:
    """A send or receive on the helper thread: gloo gives these up when one wait is cut short."""

    def __init__(self, helper: "_Helper", begin: Begin) -> None:
        self.begin = begin
        self.error: RuntimeError | None = None
        self.is_over = threading.Event()
        helper.put(self)


def _is_over(work: Work | Exchange | _Transfer) -> bool:
    """Wait for a slice of time; raises what the operation failed with."""
    if isinstance(work, Exchange):
        return work.is_over(_SLICE_S)
    if isinstance(work, _Transfer):
        is_over = work.is_over.wait(_SLICE_S)
        if work.error is not None:
            raise work.error
        return is_over
    try:
        work.wait(timedelta(seconds=_SLICE_S))
    except RuntimeError:
        if not work.is_completed():
            return False  # the slice ended, not the operation
        work.wait()  # it ended just after the slice: raises if it failed
    return True


_Helper = queue.SimpleQueue[_Transfer | None]


def _carry(transfers: _Helper) -> None:
    while transfer := transfers.get():
        try:
            work = transfer.begin()
            assert isinstance(work, Work), "of the process group"
            work.wait()
            del work
        except RuntimeError as error:
            transfer.error = error
        transfer.is_over.set()
        del transfer  # not kept until the next one comes
