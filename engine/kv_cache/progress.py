"""How far a rank is in writing the KV of its steps: its engine thread tells, others ask."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class KvProgress:
    """Of one pool. Steps have ascending numbers, the same on every rank of a worker.

    What a step reads or writes is not looked at: whoever asks knows which step computes what.
    """

    def __init__(self, num_layers: int) -> None:
        """Of a pool of `num_layers` layers, before the first step."""
        self.num_layers = num_layers
        self._reached = (0, num_layers)
        """The step under way or the last one, and its first layers that are written."""
        self._has_news = False
        self._lock = threading.Lock()
        self._listeners: list[Callable[[], None]] = []

    def begin(self, step: int) -> None:
        """From now on `step` is computed; all before it are written. Engine thread only."""
        assert step > self._reached[0], f"step {step} after {self._reached[0]}"
        self.tell()
        self._reached = (step, 0)

    def reach(self, num_layers: int) -> None:
        """The first `num_layers` layers of the step under way are written. Engine thread only."""
        self._reached = (self._reached[0], num_layers)
        self._has_news = True
        self.tell()

    def end(self) -> None:
        """The step under way is written, of which `tell` tells. Engine thread only."""
        self._reached = (self._reached[0], self.num_layers)
        self._has_news = True

    def tell(self) -> None:
        """Wake those who wait, if there is anything new. Engine thread only."""
        if not self._has_news:
            return
        self._has_news = False
        with self._lock:
            listeners = tuple(self._listeners)
        for on_reached in listeners:
            on_reached()

    def layers_of(self, step: int) -> int:
        """How many first layers of this pool have what `step` writes; any thread may ask."""
        latest, num_layers = self._reached
        if step == latest:
            return num_layers
        return self.num_layers if step < latest else 0

    @contextmanager
    def telling(self, on_reached: Callable[[], None]) -> Iterator[None]:
        """Inside the block each `tell` calls `on_reached`, on the engine thread: no waiting."""
        with self._lock:
            self._listeners.append(on_reached)
        try:
            yield
        finally:
            with self._lock:
                self._listeners.remove(on_reached)
