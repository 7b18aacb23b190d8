"""How many sequences may be open at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from engine.errors import CapacityError


class Admission:
    """Counts open sequences against a limit; nobody waits here, the workers have the queues."""

    def __init__(self, max_num_sequences: int) -> None:
        self._max_num_sequences = max_num_sequences
        self.num_sequences = 0

    @contextmanager
    def admitted(self, num_sequences: int) -> Iterator[None]:
        """Hold places inside the block.

        Raises:
            CapacityError: the limit is reached; nothing was taken.
        """
        if self.num_sequences + num_sequences > self._max_num_sequences:
            raise CapacityError(
                f"{self.num_sequences} sequences are open, the gateway takes "
                f"{self._max_num_sequences}; try again shortly"
            )
        self.num_sequences += num_sequences
        try:
            yield
        finally:
            self.num_sequences -= num_sequences
