"""A rank that has no scheduler: it computes what rank 0 says until rank 0 ends it."""

import asyncio
import logging
import signal
import threading
import time

from engine.errors import EngineDeadError, RankGroupError
from engine.kv_cache.pool import KvPool
from engine.runtime.allocator import keep_freed_memory
from engine.runtime.core_share import CoreShare
from engine.runtime.leader import Leader
from engine.runtime.rank_message import Serving, StartCounting, Step, Stop, check_plan
from engine.runtime.rank_runner import RankRunner
from engine.scheduling.limits import EngineLimits

logger = logging.getLogger(__name__)

_IDLE_AFTER_S = 0.02
"""Without a plan for so long, others may borrow the cores, and rank 0 hears the times."""
_TELL_EVERY_S = 1.0
"""Under load rank 0 hears the times so often."""


class Follower:
    """Owns one rank's model and pool; `run` on the thread that shall compute."""

    def __init__(
        self,
        local: RankRunner,
        leader: Leader,
        cores: CoreShare,
        limits: EngineLimits,
        *,
        max_num_batched_tokens: int,
    ) -> None:
        """Put a follower together; `build_follower` does it for a model on disk."""
        self.limits = limits
        self._local = local
        self._leader = leader
        self._cores = cores
        self._max_num_batched_tokens = max_num_batched_tokens
        self._has_settled = False
        self._told_s = 0.0

    @property
    def rank(self) -> int:
        return self._local.group.rank

    @property
    def pool(self) -> KvPool:
        return self._local.runner.pool

    def say_serving(self, address: str) -> None:
        """Tell rank 0 where other processes reach this rank's pool; before `run`.

        Raises:
            RankDeadError: rank 0 is gone.
        """
        self._leader.send(Serving(address))

    def run(self) -> None:
        """Compute plans until rank 0 says that it is over.

        Raises:
            RankDeadError: rank 0 is gone.
            EngineDeadError: another rank is, or a plan is wrong.
        """
        keep_freed_memory()
        self._leader.start_beating(lambda: self._local.report)
        try:
            while isinstance(message := self._next(), Step | StartCounting):
                if isinstance(message, Step):
                    self._compute(message)
                else:
                    self._local.runner.start_counting()
            if not isinstance(message, Stop):
                raise EngineDeadError(f"rank 0 sent {type(message).__name__} in place of a plan")
        except BaseException as error:
            self._leader.tell_failure(error)
            if not isinstance(error, RankGroupError):  # else the group is over already
                self._local.group.abort(f"{type(error).__name__}: {error}")
            raise

    def close(self) -> None:
        """Free the pool and leave the group."""
        self._cores.close()
        self._leader.close()
        self._local.runner.close()

    def _next(self) -> object:
        is_idle = not self._leader.has_message(_IDLE_AFTER_S)
        if is_idle:
            self._cores.rest()
        if is_idle or time.monotonic() - self._told_s > _TELL_EVERY_S:
            self._leader.send(self._local.report)
            self._told_s = time.monotonic()
        return self._leader.receive()

    def _compute(self, step: Step) -> None:
        check_plan(step.plan, self.limits, self._max_num_batched_tokens)
        grant = self._cores.begin_step()
        num_threads = grant.num_threads if self._has_settled else self._cores.most_threads
        self._local.begin(step, num_threads)
        if not self._has_settled:  # the first step is a warm-up that starts every helper thread
            self._cores.settle()
            self._has_settled = True


async def follow(follower: Follower) -> None:
    """Run `follower` on a thread of its own until rank 0 ends it.

    SIGTERM and Ctrl-C are rank 0's business: it drains, and the other ranks with it.

    Raises:
        EngineDeadError: as `Follower.run`.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()

    def end(error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            follower.run()
        except BaseException as raised:  # noqa: BLE001 - raised again in the coroutine
            error = raised
        loop.call_soon_threadsafe(end, error)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, logger.info, "rank %d ends with rank 0", follower.rank)
    threading.Thread(target=run, name="engine", daemon=True).start()
    try:
        await ended
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):  # not even while the process ends
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
