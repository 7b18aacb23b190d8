"""Whether fetching a prefix is cheaper than computing it, from what both have cost lately."""

from dataclasses import dataclass

from engine.runtime.commands import EngineStats

PROBE_EVERY = 32
"""After so many refusals in a row one fetch is made all the same: the store may be faster now."""
_MEMORY = 0.8
"""What is left of an observation's weight after the next one."""
_MEMORY_TOKENS = 4096
"""Prefill older than this many tokens counts less than half."""


@dataclass(frozen=True, slots=True)
class Choice:
    is_fetch: bool
    reason: str
    """unmeasured, cheaper or probe: of whichever was chosen."""


class RunningLine:
    """y = a + b x by least squares over recent observations; neither a nor b is negative."""

    def __init__(self) -> None:
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, x: float, y: float) -> None:
        for name, value in (("_n", 1.0), ("_x", x), ("_y", y), ("_xx", x * x), ("_xy", x * y)):
            setattr(self, name, _MEMORY * getattr(self, name) + value)

    def predict(self, x: float) -> float | None:
        """None before the first observation."""
        if not self._n:
            return None
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance <= 1e-6 * mean_x**2:  # one size only: it says nothing of others
            return mean_y * x / mean_x if mean_x else mean_y
        slope = (self._xy / self._n - mean_x * mean_y) / variance
        if slope < 0:
            return mean_y
        start = mean_y - slope * mean_x
        return start + slope * x if start >= 0 else self._xy / self._xx * x


class FetchCost:
    """Fetches by latency and bytes, prefill by tokens; loop only."""

    def __init__(self) -> None:
        self._fetch = RunningLine()
        self._seen = EngineStats()
        self._prefill_tokens = 0.0
        self._prefill_s = 0.0
        self._num_refused = 0

    @property
    def prefill_tokens_per_s(self) -> float | None:
        """None before the engine has computed a prompt."""
        return self._prefill_tokens / self._prefill_s if self._prefill_s else None

    def fetch_s(self, num_bytes: int) -> float | None:
        """What a fetch of this size would take; None before the first one."""
        return self._fetch.predict(num_bytes)

    def compute_s(self, num_tokens: int) -> float | None:
        """What computing them would take; None before the engine has computed a prompt."""
        rate = self.prefill_tokens_per_s
        return None if rate is None else num_tokens / rate

    def observe_fetch(self, num_bytes: int, duration_s: float) -> None:
        self._fetch.observe(num_bytes, duration_s)

    def observe_engine(self, stats: EngineStats) -> None:
        """Take what was computed since the last call into account."""
        num_tokens = stats.num_prefill_tokens - self._seen.num_prefill_tokens
        spent_s = stats.prefill_s_total - self._seen.prefill_s_total
        self._seen = stats
        kept = 0.5 ** (num_tokens / _MEMORY_TOKENS)
        self._prefill_tokens = kept * self._prefill_tokens + num_tokens
        self._prefill_s = kept * self._prefill_s + spent_s

    def choose(self, *, num_tokens: int, num_bytes: int) -> Choice:
        """What to do about tokens that are missing here."""
        fetch_s, compute_s = self.fetch_s(num_bytes), self.compute_s(num_tokens)
        if fetch_s is None or compute_s is None:
            return Choice(is_fetch=True, reason="unmeasured")
        if fetch_s <= compute_s:
            return Choice(is_fetch=True, reason="cheaper")
        self._num_refused += 1
        if self._num_refused >= PROBE_EVERY:
            self._num_refused = 0
            return Choice(is_fetch=True, reason="probe")
        return Choice(is_fetch=False, reason="cheaper")
