"""Notes what must never happen in a simulated schedule."""

import asyncio
import logging
from typing import Any

from engine.errors import IsthmusError


class Watch(logging.Handler):
    """Violations of one schedule, and what happened on the way when it is traced."""

    def __init__(self, *, is_tracing: bool = False) -> None:
        super().__init__(logging.ERROR)
        self.violations: list[str] = []
        self.trace: list[str] = []
        self._is_tracing = is_tracing

    def violate(self, text: str) -> None:
        self.violations.append(f"{_now_s():.4f} {text}")
        self.note("VIOLATION", text)

    def note(self, *what: object) -> None:
        if self._is_tracing:
            self.trace.append(f"{_now_s():.4f} " + " ".join(map(str, what)))

    def emit(self, record: logging.LogRecord) -> None:
        """An error that the code under test has logged; deliberate ones are none."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, IsthmusError):
            self.violate(f"logged: {record.getMessage()}: {error!r}")

    def on_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        del loop
        if not isinstance(context.get("exception"), IsthmusError):
            self.violate(f"{context['message']}: {context.get('exception')!r}")


def _now_s() -> float:
    try:
        return asyncio.get_running_loop().time() - 1000.0
    except RuntimeError:  # what has ended is being collected
        return -1.0
