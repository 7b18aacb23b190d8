"""Token ids to text as they come: whole characters only, cut exactly at stop strings."""

import codecs
from collections.abc import Sequence

from gateway.token_bytes import TokenBytes


class StopCutter:
    """Cuts a growing text at the first stop string that completes in it.

    Of stop strings that complete at the same character the longest counts, so that the result
    depends on the text only and not on how it was split. Held back is what may still become one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str) -> str:
        """Take more text; returns what is sure to stand before every stop string."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        window = self._held + text
        cut = self._first_stop(window)
        if cut is not None:
            self.is_stopped, self._held = True, ""
            return window[:cut]
        num_held = self._num_held(window)
        self._held = window[len(window) - num_held :]
        return window[: len(window) - num_held]

    def flush(self) -> str:
        """The text has ended: nothing can become a stop string any more."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, window: str) -> int | None:
        found = [
            (start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _num_held(self, window: str) -> int:
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(window)), longest, -1):
                if window.endswith(stop[:length]):
                    longest = length
                    break
        return longest


class Detokenizer:
    """Turns the tokens of one answer into text.

    A character whose bytes spread over tokens comes out whole with its last byte; bytes that no
    later token can complete become U+FFFD, as in decoding the answer in one piece.
    """

    def __init__(self, token_bytes: TokenBytes, stops: Sequence[str] = ()) -> None:
        self._token_bytes = token_bytes
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._cutter = StopCutter(stops) if stops else None

    @property
    def is_stopped(self) -> bool:
        """True once a stop string has ended the answer."""
        return self._cutter is not None and self._cutter.is_stopped

    def push(self, token_id: int) -> str:
        """The text that this token settles; special tokens add none."""
        text = self._decode(self._token_bytes.visible(token_id))
        return self._cutter.push(text) if self._cutter is not None and text else text

    def finish(self) -> str:
        """The answer has ended: returns what was held back, nothing after a stop string."""
        rest = self._decode(b"", final=True)
        if self._cutter is None:
            return rest
        rest = self._cutter.push(rest)
        return rest if self._cutter.is_stopped else rest + self._cutter.flush()
