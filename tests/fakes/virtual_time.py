"""An event loop whose time is made up: it jumps to the next timer instead of waiting for it."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class EverybodyWaitsError(Exception):
    """Nothing is scheduled any more, and the work is not done: a deadlock."""


class _NoWaiting(selectors.SelectSelector):
    """Instead of waiting for descriptors, lets the time pass."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise EverybodyWaitsError
        self.now_s += max(timeout, 0.0)
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs coroutines that use neither sockets nor threads; the same code takes the same turns."""

    def __init__(self) -> None:
        self._no_waiting = _NoWaiting()
        super().__init__(self._no_waiting)

    def time(self) -> float:
        return self._no_waiting.now_s


def run_in_virtual_time(work: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(work)
