"""Sends that wait for room, so that the thread that computes does not."""

import threading
from collections import deque
from collections.abc import Callable

import torch

TrySend = Callable[[torch.Tensor, int], bool]
"""Send to a rank; False: there is no room yet, and the same call is to be made again."""

FLUSH_S = 1.0
"""How long a rank that leaves waits until its last sends have room."""
_PAUSE_S = 0.0005


class Outbox:
    """Sends in order: at once while there is room, else on a thread of its own.

    Two ranks that send to each other before either receives would otherwise wait for ever where
    messages are larger than what lies between them.
    """

    def __init__(self, try_send: TrySend, *, name: str) -> None:
        """`try_send` is called by one thread at a time."""
        self._try_send = try_send
        self._name = name
        self._lock = threading.Lock()
        self._waiting: deque[tuple[torch.Tensor, int]] = deque()
        self._error: Exception | None = None
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def send(self, x: torch.Tensor, to: int) -> None:
        """Send `x`, which must not be changed any more, to rank `to`.

        Raises:
            RankGroupError: this, or an earlier send, failed.
        """
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._waiting and self._try_send(x, to):
                return
            self._waiting.append((x, to))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()

    def close(self) -> None:
        """What still waits after a moment is dropped."""
        thread = self._thread
        if thread is not None:
            thread.join(FLUSH_S)
            self._is_closed.set()
            thread.join()

    def _run(self) -> None:
        """Empty the queue, then end."""
        while not self._is_closed.wait(_PAUSE_S):
            with self._lock:
                try:
                    while self._waiting and self._try_send(*self._waiting[0]):
                        self._waiting.popleft()
                except Exception as error:  # noqa: BLE001 - raised again by the next send
                    self._error = error
                if self._error is not None or not self._waiting:
                    self._thread = None
                    return
