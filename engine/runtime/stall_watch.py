"""Notices a step that does not end: a stuck kernel or device must not leave clients waiting."""

import time
from collections.abc import Callable

from engine.errors import EngineDeadError


class StallWatch:
    """One thread says when its step begins and ends; another asks whether it takes too long."""

    def __init__(self, timeout_s: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """`timeout_s` is longer than any step that makes progress."""
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._begun_s: float | None = None

    def begin_step(self) -> None:
        self._begun_s = self._monotonic()

    def end_step(self) -> None:
        self._begun_s = None

    @property
    def interval_s(self) -> float:
        """How often to ask, so that a stall is noticed within a tenth of its time-out."""
        return self._timeout_s / 10

    @property
    def stall(self) -> EngineDeadError | None:
        """What to die of, once the step has taken longer than it may."""
        begun_s = self._begun_s  # the other thread may end the step now
        if begun_s is None or self._monotonic() - begun_s <= self._timeout_s:
            return None
        return EngineDeadError(
            f"a step of the engine has not ended within step_timeout_s={self._timeout_s:g}"
        )
