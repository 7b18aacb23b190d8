"""A follower's view of rank 0: what it wants computed, and its end."""

import select
import threading
from collections.abc import Callable

from engine.errors import EngineDeadError, LayoutMismatchError, RankGroupError
from engine.runtime.rank_message import (
    Agreed,
    Facts,
    FollowerMessage,
    LeaderMessage,
    Refused,
    decode_from_leader,
    failure_of,
)
from engine.runtime.rank_socket import RankSocket


class Leader:
    """The connection from one rank to rank 0."""

    def __init__(self, connection: RankSocket, *, beat_s: float) -> None:
        """Take over the connection; `beat_s` is from one sign of life to the next."""
        self._connection = connection
        self._beat_s = beat_s
        self._is_closing = threading.Event()

    def agree(self, facts: Facts) -> int:
        """Say what is loaded here; returns the blocks that the pool shall have.

        Raises:
            LayoutMismatchError: rank 0 refuses: this or another rank differs or has failed.
            RankDeadError: rank 0 is gone.
        """
        self._connection.send(facts)
        answer = self.receive()
        if isinstance(answer, Refused):
            raise LayoutMismatchError(f"rank 0 ends the start: {answer.reason}")
        if not isinstance(answer, Agreed):
            raise EngineDeadError(f"rank 0 sent {type(answer).__name__} in place of an agreement")
        return answer.num_blocks

    def expect(self, max_bytes: int) -> None:
        """Messages may be as long as this from now on."""
        self._connection.max_bytes = max_bytes

    def receive(self) -> LeaderMessage:
        """The next message; waits as long as rank 0 lives.

        Raises:
            RankDeadError: rank 0 is gone.
            ValueError: what came is no message.
        """
        return decode_from_leader(self._connection.receive())

    def has_message(self, timeout_s: float) -> bool:
        """Wait a while for a message, or for rank 0's end."""
        return self._connection.has_data(timeout_s)

    def send(self, message: FollowerMessage) -> None:
        self._connection.send(message)

    def start_beating(self, message: Callable[[], FollowerMessage]) -> None:
        """Send `message()` regularly from now on: rank 0 takes a silent rank for stopped."""

        def beat() -> None:
            while not self._is_closing.wait(self._beat_s):
                try:
                    self._connection.send(message())
                except RankGroupError:
                    return

        threading.Thread(target=beat, name="rank-beat", daemon=True).start()

    def tell_failure(self, error: BaseException) -> None:
        """Say why this rank ends, if rank 0 is there to hear it."""
        try:
            self._connection.send(failure_of(error))
        except RankGroupError:
            return

    def call_when_gone(self, on_gone: Callable[[], None]) -> None:
        """Call `on_gone` on a thread of its own once rank 0 has closed the connection or died."""
        poll = select.poll()
        poll.register(self._connection.fileno(), select.POLLRDHUP)

        def wait() -> None:
            poll.poll()
            on_gone()

        threading.Thread(target=wait, name="leader", daemon=True).start()

    def close(self) -> None:
        self._is_closing.set()
        self._connection.close()
