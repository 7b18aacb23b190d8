"""Rank 0's view of the other ranks of its worker: what they loaded, plans to them, their end."""

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from engine.errors import CollectiveTimeoutError, LayoutMismatchError, RankDeadError, RankGroupError
from engine.runtime.rank_message import (
    Agreed,
    Facts,
    Failed,
    FollowerMessage,
    LeaderMessage,
    RankReport,
    RankTimes,
    Refused,
    Serving,
    Stop,
    beat_interval_s,
    decode_from_follower,
    encode,
)
from engine.runtime.rank_socket import RankSocket, by_descriptor

logger = logging.getLogger(__name__)

Message = TypeVar("Message", Facts, Serving)

_OWN_FACTS = {"num_blocks", "kv_share"}
_LAST_WORDS_S = 0.2
"""How long a rank's own words may come after what its end did to a step."""

OnFailure = Callable[[RankGroupError], None]


@dataclass(slots=True)
class _Watch:
    """What the watching thread and the others share, under one lock."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    failure: RankGroupError | None = None
    on_failure: OnFailure | None = None
    is_stopping: bool = False


class Followers:
    """Connections from rank 0 to every other rank. `agree` first, then `start_watching`."""

    def __init__(self, sockets: Mapping[int, RankSocket], *, timeout_s: float) -> None:
        """Take over the sockets; a rank that is silent for `timeout_s` is taken for stopped."""
        self._sockets = dict(sockets)
        self._timeout_s = timeout_s
        self._reports = {rank: RankReport(RankTimes(rank=rank)) for rank in sockets}
        self._watch = _Watch()
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)

    @property
    def reports(self) -> list[RankReport]:
        """What each rank said last; any thread may ask."""
        return [self._reports[rank] for rank in sorted(self._reports)]

    def agree(self, facts: Facts, *, timeout_s: float) -> dict[int, Facts]:
        """Wait until every rank has loaded, compare; returns what each rank has, by rank.

        Every rank's pool gets `fewest_blocks` of them.

        Raises:
            LayoutMismatchError: a rank has loaded something else; the text shows both sides.
            RankGroupError: a rank failed, died, or was not done within `timeout_s`.
        """
        try:
            others = self._gather(Facts, "load the model", timeout_s)
            check_agreement(facts, others)
        except Exception as error:
            self.refuse(str(error))
            raise
        found = {0: facts, **others}
        self.send(Agreed(fewest_blocks(found)))
        return found

    def expect(self, max_bytes: int) -> None:
        """Reports may be as long as this from now on."""
        for each in self._sockets.values():
            each.max_bytes = max_bytes

    def addresses(self, *, timeout_s: float) -> list[str]:
        """Where the other ranks' pools can be reached, in rank order; waits until all serve.

        Call it after `agree` and before `start_watching`.

        Raises:
            RankGroupError: a rank failed, died, or does not serve within `timeout_s`.
        """
        found = self._gather(Serving, "serve its pool", timeout_s)
        return [found[rank].address for rank in sorted(found)]

    def refuse(self, reason: str) -> None:
        """Tell all ranks that the start has failed, as far as they are there."""
        for each in self._sockets.values():
            try:
                each.send(Refused(reason))
            except RankGroupError:
                logger.debug("rank %d is gone, too", each.peer)

    def send(self, message: LeaderMessage) -> None:
        """Send to every rank.

        Raises:
            RankGroupError: a rank is gone, or stopped; the worker is over.
        """
        frame = encode(message)
        for each in self._sockets.values():
            try:
                each.send_frame(frame)
            except RankDeadError as error:
                raise self.explained(error) from None

    def explained(self, error: RankGroupError) -> RankGroupError:
        """What a rank said before it ended, where it did; else `error`, which came of its end."""
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=_LAST_WORDS_S)
        return self._watch.failure or error

    def start_watching(self, on_failure: OnFailure) -> None:
        """From now on hear of a rank's end on a thread of its own, at most one time.

        A process that is gone shows at once; one that is stopped, after the time-out.
        """
        self._watch.on_failure = on_failure
        self._thread.start()

    def close(self) -> None:
        """Tell the ranks to end in order; those of a group that failed see the sockets end.

        Rank 0 leaves last: a rank that still computes would take its end for a death.
        """
        with self._watch.lock:
            is_first, self._watch.is_stopping = not self._watch.is_stopping, True
        if not is_first:
            return
        is_in_order = self._watch.failure is None
        if is_in_order:
            try:
                self.send(Stop())
            except RankGroupError as error:
                is_in_order = False
                logger.warning("a rank was gone before the end: %s", error)
        os.write(self._wake_write, b"x")
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        if is_in_order:
            self._wait_until_left()
        for each in self._sockets.values():
            each.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _wait_until_left(self) -> None:
        """Return when every rank has closed its end, or was silent for too long."""
        poll, left = select.poll(), by_descriptor(self._sockets)
        for descriptor in left:
            poll.register(descriptor, select.POLLRDHUP)
        end_s = time.monotonic() + self._timeout_s
        while left:
            gone = poll.poll(max(0.0, end_s - time.monotonic()) * 1000)
            if not gone:
                ranks = sorted(each.peer for each in left.values())
                logger.warning("ranks %s did not end within %g s", ranks, self._timeout_s)
                return
            for descriptor, _ in gone:
                poll.unregister(descriptor)
                del left[descriptor]

    def _gather(self, kind: type[Message], what: str, timeout_s: float) -> dict[int, Message]:
        """The next message of every rank, which must be of this kind."""
        found: dict[int, Message] = {}
        end_s = time.monotonic() + timeout_s
        poll = select.poll()
        sockets = by_descriptor(self._sockets)
        for descriptor in sockets:
            poll.register(descriptor, select.POLLIN)
        while missing := sorted(set(self._sockets) - set(found)):
            ready = poll.poll(max(0.0, end_s - time.monotonic()) * 1000)
            if not ready:
                text = f"ranks {missing} did not {what} within {timeout_s:g} s"
                raise CollectiveTimeoutError(text, rank=missing[0], operation="start")
            for descriptor, _ in ready:
                each = sockets[descriptor]
                message = decode_from_follower(each.receive())
                if isinstance(message, Failed):
                    raise _failure(each.peer, message)
                if isinstance(message, kind):
                    found[each.peer] = message
                    poll.unregister(descriptor)
        return found

    # The watching thread.

    def _run(self) -> None:
        sockets = by_descriptor(self._sockets)
        poll = select.poll()
        for descriptor in (self._wake_read, *sockets):
            poll.register(descriptor, select.POLLIN)
        beat_s = beat_interval_s(self._timeout_s)
        # Counted in beats of this thread: should this process be stopped for a while, none passes.
        num_beats_silent = dict.fromkeys(self._sockets, 0)
        next_beat_s = time.monotonic() + beat_s
        while True:
            failure: RankGroupError | None = None
            for descriptor, _ in poll.poll(max(0.0, next_beat_s - time.monotonic()) * 1000):
                if descriptor == self._wake_read:
                    return
                each = sockets[descriptor]
                num_beats_silent[each.peer] = 0
                failure = failure or self._heard(each)
            if time.monotonic() >= next_beat_s:
                next_beat_s = time.monotonic() + beat_s
                num_beats_silent = {rank: num + 1 for rank, num in num_beats_silent.items()}
                failure = failure or self._silence(num_beats_silent, beat_s)
            if failure is not None:
                self._fail(failure)
                return

    def _silence(self, num_beats: Mapping[int, int], beat_s: float) -> RankGroupError | None:
        """A rank that has not been heard for the whole time-out, if there is one."""
        for rank, num in num_beats.items():
            if num * beat_s > self._timeout_s:
                text = f"rank {rank} has been silent for {self._timeout_s:g} s: it is stopped"
                return CollectiveTimeoutError(text, rank=rank, operation="heartbeat")
        return None

    def _heard(self, each: RankSocket) -> RankGroupError | None:
        try:
            message: FollowerMessage = decode_from_follower(each.receive())
        except RankGroupError as error:
            return error
        except ValueError as error:
            return RankGroupError(f"rank {each.peer}: {error}", rank=each.peer)
        if isinstance(message, Failed):
            return _failure(each.peer, message)
        if isinstance(message, RankReport):
            self._reports[each.peer] = message
        return None

    def _fail(self, failure: RankGroupError) -> None:
        with self._watch.lock:
            if self._watch.is_stopping:
                return
            self._watch.failure = failure
        logger.error("rank=%s %s", failure.rank, failure)
        if self._watch.on_failure is not None:
            self._watch.on_failure(failure)


def fewest_blocks(facts: Mapping[int, Facts]) -> int:
    """For which every rank has memory."""
    return min(each.num_blocks for each in facts.values())


def check_agreement(facts: Facts, others: Mapping[int, Facts]) -> None:
    """Compare what rank 0 has loaded with what the others have.

    Raises:
        LayoutMismatchError: the text shows both sides of each difference.
    """
    compared = [name for name in Facts.__struct_fields__ if name not in _OWN_FACTS]
    for rank, theirs in sorted(others.items()):
        differences = [
            f"{name} is {getattr(facts, name)} on rank 0 and {getattr(theirs, name)} on rank {rank}"
            for name in compared
            if getattr(facts, name) != getattr(theirs, name)
        ]
        if differences:
            raise LayoutMismatchError(
                f"the ranks of this worker were started differently: {'; '.join(differences)}"
            )


def _failure(rank: int, message: Failed) -> RankGroupError:
    if message.blamed_rank is not None:
        text = f"rank {rank} says: {message.text}"
        return RankGroupError(text, rank=message.blamed_rank)
    return RankGroupError(f"rank {rank} failed: {message.error}: {message.text}", rank=rank)
