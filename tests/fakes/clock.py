"""Time that moves only when a test says so."""


class FakeClock:
    """Pass it where a function that returns monotonic seconds is wanted."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
