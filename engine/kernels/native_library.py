"""The C library of kernels as Python functions: where it lies, what it exports, how to call it.

Calls that take microseconds keep the interpreter lock, since giving it up could cost the engine
thread a wait for the event loop; calls that take longer release it.
"""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path

LIBRARY_PATH = Path(__file__).parent / "libisthmus.so"
VERSION = 6

_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p

_LINEAR = [
    *(_int, _pointer, _long, _pointer, _pointer, _pointer, _int, _int),
    *(_long, _long, _long, _int),
]
_NORM = [_int, _pointer, _long, _pointer, _pointer, _float, _pointer, _long, _long, _int]
_SILU = [_int, _pointer, _pointer, _long, _long, _int]
_ROPE = [
    *(_int, _pointer, _long, _pointer, _pointer, _pointer, _pointer, _float),
    *(_pointer, _pointer, _pointer, _long, _pointer, _long, _int),
]
_ATTENTION = [
    *(_int, _pointer, _pointer, _pointer, _pointer, _long, _pointer, _long),
    *(_pointer, _pointer, _long, _long, _float, _int),
]
_ATTENTION_PART = [
    *(_int, _pointer, _pointer, _pointer, _pointer, _pointer, _long, _pointer, _long),
    *(_pointer, _pointer, _pointer, _pointer, _long, _long, _float, _int),
]
_ATTENTION_HALF = [_pointer] * 9
_MLP_HALF = [_pointer] * 5
_LAYERS = [_pointer, _long, _long, *([_pointer] * 7)]

NativeCall = Callable[..., None]


class NativeLibrary:
    """Loaded once a process; its threads start with the first call that asks for more than one.

    Raises:
        OSError: the file is missing, or was built for another machine or another version.
    """

    def __init__(self, path: Path = LIBRARY_PATH) -> None:
        releasing = ctypes.CDLL(str(path))
        holding = ctypes.PyDLL(str(path))
        version = releasing.isthmus_version()
        if version != VERSION:
            raise OSError(f"{path.name} has version {version}, this code needs {VERSION}: rebuild")
        self._num_levels: Callable[[], int] = releasing.isthmus_num_levels
        self._use_level: Callable[[int], int] = releasing.isthmus_use_level
        self._level_name = releasing.isthmus_level_name
        self._level_name.restype = ctypes.c_char_p
        self._packed_bytes = releasing.isthmus_packed_bytes
        self._packed_bytes.argtypes = [_int, _long, _long]
        self._packed_bytes.restype = _long
        self._has_gated = releasing.isthmus_has_gated
        self._has_gated.argtypes = [_int, _long]
        self.pack = _bound(
            releasing, "isthmus_pack", [_int, _pointer, _long, _long, _long, _pointer]
        )
        self.linear = _bound(releasing, "isthmus_linear", _LINEAR)
        self.attention = _bound(releasing, "isthmus_attention", _ATTENTION)
        self.attention_part = _bound(releasing, "isthmus_attention_part", _ATTENTION_PART)
        self.attention_half = _bound(releasing, "isthmus_attention_half", _ATTENTION_HALF)
        self.mlp_half = _bound(releasing, "isthmus_mlp_half", _MLP_HALF)
        self.layers = _bound(releasing, "isthmus_layers", _LAYERS)
        self.rms_norm = _bound(releasing, "isthmus_rms_norm", _NORM)
        self.silu_mul = _bound(releasing, "isthmus_silu_mul", _SILU)
        self.rope = _bound(releasing, "isthmus_rope", _ROPE)
        self.rms_norm_few = _bound(holding, "isthmus_rms_norm", _NORM)
        self.silu_mul_few = _bound(holding, "isthmus_silu_mul", _SILU)
        self.rope_few = _bound(holding, "isthmus_rope", _ROPE)

    def level_names(self) -> list[str]:
        """Instruction sets this CPU can run, slowest first; the last is in use."""
        return [self._level_name(level).decode() for level in range(self._num_levels())]

    def use_level(self, level: int) -> None:
        """Run another instruction set from now on; packed weights stay valid."""
        if self._use_level(level):
            raise ValueError(f"level must be in [0, {self._num_levels()}), got {level}")

    def packed_bytes(self, dtype: int, num_out: int, inner: int) -> int:
        return int(self._packed_bytes(dtype, num_out, inner))

    def has_gated(self, dtype: int, num_out: int) -> bool:
        """Whether `linear` can apply silu to the first half of the features, times the second."""
        return bool(self._has_gated(dtype, num_out))


def _bound(library: ctypes.CDLL, name: str, argtypes: Sequence[type]) -> NativeCall:
    function = getattr(library, name)
    function.argtypes = argtypes
    function.restype = None
    call: NativeCall = function
    return call
