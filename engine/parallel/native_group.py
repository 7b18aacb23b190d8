"""The part of the C library that moves bytes among the ranks of one host, as Python functions.

Each call is there twice: one keeps the interpreter lock and gives up after a few microseconds, the
other lets it go and waits. Calls that are over at once then never queue for the lock.
"""

import ctypes
import functools
from collections.abc import Callable
from enum import IntEnum
from typing import Any

from engine.kernels.native_library import LIBRARY_PATH

_i32, _i64, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p

Call = Callable[..., int]

# Without the last two arguments, which all have: time-out in ns (or -1), and whether it is brief.
_CALLS: dict[str, list[type]] = {
    "all_reduce": [_i32, _pointer, _i64],
    "all_gather": [_pointer, _pointer, _pointer],
    "reduce_scatter": [_i32, _pointer, _pointer, _pointer],
    "all_to_all": [_pointer, _pointer, _pointer, _pointer],
    "broadcast": [_pointer, _i64, _i32],
    "barrier": [],
    "send": [_pointer, _i64, _i32],
    "receive": [_pointer, _i64, _i32],
}


class Answer(IntEnum):
    """What a call comes back with; as in collectives.h."""

    DONE = 0
    AGAIN = 1
    GIVEN_UP = 2
    MISMATCH = 3


class NativeGroupLibrary:
    """The functions of collectives.c, mailbox.c and rank_wait.c.

    Raises:
        OSError: the library is missing, or was built before it had them.
    """

    def __init__(self) -> None:
        waiting = ctypes.CDLL(str(LIBRARY_PATH))
        brief = ctypes.PyDLL(str(LIBRARY_PATH))
        try:
            self.waiting = {name: _bound(waiting, name) for name in _CALLS}
            self.brief = {name: _bound(brief, name) for name in _CALLS}
            self.board_bytes = _function(brief, "board_bytes", [_i32], _i64)
            self.board_verdict = _function(brief, "board_verdict", [_pointer], ctypes.c_uint64)
            self.board_post = _function(
                brief,
                "board_post",
                [_pointer, _i32, ctypes.c_int, ctypes.c_uint32, ctypes.c_char_p],
                None,
            )
            self.board_reason = _function(brief, "board_reason", [_pointer, _i32], ctypes.c_char_p)
            self.board_leave = _function(brief, "board_leave", [_pointer, _i32], None)
            self.group_bytes = _function(brief, "group_bytes", [_i32, _i64, _i64], _i64)
            self.group_open = _function(
                brief,
                "group_open",
                [*(_pointer, _pointer, _i32, _i32, _i64, _i64, _i64), _pointer, _pointer],
                _pointer,
            )
            self.group_close = _function(brief, "group_close", [_pointer], None)
            self.group_mismatch = _function(brief, "group_mismatch", [_pointer, _pointer], _i64)
        except AttributeError as error:
            raise OSError(f"{LIBRARY_PATH.name} is older than its sources: {error}") from None


@functools.cache
def native_group_library() -> NativeGroupLibrary:
    """Loaded once a process."""
    return NativeGroupLibrary()


def _bound(library: ctypes.CDLL, name: str) -> Call:
    argtypes: list[type] = [_pointer, *_CALLS[name], _i64, ctypes.c_int]
    call: Call = _function(library, f"group_{name}", argtypes, ctypes.c_int)
    return call


def _function(
    library: ctypes.CDLL, name: str, argtypes: list[type], restype: type | None
) -> Callable[..., Any]:
    function = getattr(library, f"isthmus_{name}")
    function.argtypes = argtypes
    function.restype = restype
    call: Callable[..., Any] = function
    return call
