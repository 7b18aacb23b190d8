"""One GGUF file: its metadata as Python values and its tensors as float32 arrays.

The header is parsed here because `gguf.GGUFReader` makes several numpy views for each string of
the vocabulary, which costs seconds; the quantisation formats are the `gguf` package's own.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from engine.errors import CheckpointError

MetadataValue = str | int | float | bool | list["MetadataValue"]

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, np.dtype[Any]] = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("?"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_PLAIN_DTYPES: dict[gguf.GGMLQuantizationType, np.dtype[Any]] = {
    gguf.GGMLQuantizationType.F32: np.dtype("<f4"),
    gguf.GGMLQuantizationType.F16: np.dtype("<f2"),
    gguf.GGMLQuantizationType.F64: np.dtype("<f8"),
}
_MAX_DIMS = 4
_PIECE_VALUES = 1 << 16
"""Values dequantised at a time: the package makes several copies."""
_MAX_ARRAY_DEPTH = 4


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor's bytes lie; `shape` as torch counts it, slowest dim first."""

    name: str
    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    offset: int
    num_bytes: int


class GgufFile:
    """A GGUF file, mapped read-only; the mapping lives as long as this object.

    Raises:
        CheckpointError: the file is not GGUF, is truncated or its header makes no sense.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from None
        header = _HeaderReader(path, self._bytes)
        self.metadata, self.tensors = header.read()

    def read(
        self, name: str, rows: range | None = None, columns: range | None = None
    ) -> npt.NDArray[np.float32]:
        """Dequantise a tensor, seen as rows of its last dim; returns [rows, columns].

        Only blocks that hold something of the part asked for are dequantised, piece by piece.

        Raises:
            CheckpointError: the `gguf` package has no way back from this quantisation.
        """
        tensor = self.tensors[name]
        width = tensor.shape[-1]
        rows = range(math.prod(tensor.shape[:-1])) if rows is None else rows
        columns = range(width) if columns is None else columns
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[tensor.quantization]
        first_block, stop_block = columns.start // block_size, -(-columns.stop // block_size)
        raw = np.frombuffer(self._bytes, np.uint8, tensor.num_bytes, tensor.offset)
        raw = raw.reshape(-1, width // block_size * block_bytes)
        raw = raw[rows.start : rows.stop, first_block * block_bytes : stop_block * block_bytes]
        before = columns.start - first_block * block_size
        values = np.empty((len(rows), len(columns)), np.float32)
        step = max(1, _PIECE_VALUES // width)
        for row in range(0, len(rows), step):
            piece = self._dequantized(tensor, np.ascontiguousarray(raw[row : row + step]))
            values[row : row + step] = piece[:, before : before + len(columns)]
        return values

    def _dequantized(
        self, tensor: GgufTensor, raw: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.float32]:
        plain = _PLAIN_DTYPES.get(tensor.quantization)
        if plain is not None:
            floats: npt.NDArray[np.float32] = raw.view(plain).astype(np.float32)
            return floats
        try:
            values: npt.NDArray[np.float32] = gguf.quants.dequantize(raw, tensor.quantization)
        except NotImplementedError:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name} is quantised as {tensor.quantization.name}, "
                "which cannot be read; use a Q4_K, Q6_K, Q8_0 or F16 version of the model"
            ) from None
        return values


class _HeaderReader:
    """Walks the header once, checking each length against the file before using it."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._size = len(data)
        self._at = 0

    def read(self) -> tuple[dict[str, MetadataValue], dict[str, GgufTensor]]:
        if self._data[:4] != b"GGUF":
            raise CheckpointError(f"{self._path} is not a GGUF file")
        self._at = 4
        version = self._unsigned(4)
        if version not in {2, 3}:
            raise CheckpointError(
                f"{self._path} is GGUF version {version} or big-endian; versions 2 and 3 are read"
            )
        num_tensors, num_fields = self._unsigned(8), self._unsigned(8)
        metadata: dict[str, MetadataValue] = {}
        for _ in range(num_fields):
            key = self._string()
            metadata[key] = self._value(self._unsigned(4))
        entries = [self._tensor_entry() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}")
        data_start = -(-self._at // alignment) * alignment
        tensors = [self._tensor(data_start, *entry) for entry in entries]
        return metadata, {tensor.name: tensor for tensor in tensors}

    def _take(self, num_bytes: int) -> int:
        """Move past `num_bytes` that the file holds; returns where they start."""
        start = self._at
        if num_bytes > self._size - start:
            raise CheckpointError(
                f"{self._path} is truncated: its header needs {num_bytes} bytes at {start}, "
                f"the file has {self._size}; fetch it again"
            )
        self._at = start + num_bytes
        return start

    def _unsigned(self, num_bytes: int) -> int:
        start = self._take(num_bytes)
        return int.from_bytes(self._data[start : self._at], "little")

    def _string(self) -> str:
        length = self._unsigned(8)
        start = self._take(length)
        return self._data[start : self._at].decode("utf-8", "replace")

    def _value(self, kind: int, depth: int = 0) -> MetadataValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array(depth)
        dtype = self._scalar_dtype(kind)
        start = self._take(dtype.itemsize)
        value: MetadataValue = np.frombuffer(self._data, dtype, 1, start)[0].item()
        return value

    def _array(self, depth: int) -> MetadataValue:
        kind, length = self._unsigned(4), self._unsigned(8)
        if kind == _STRING:
            return self._strings(length)
        if kind == _ARRAY:
            if depth == _MAX_ARRAY_DEPTH or length > self._size:
                raise CheckpointError(f"{self._path}: metadata arrays are nested too deep")
            return [self._array(depth + 1) for _ in range(length)]
        dtype = self._scalar_dtype(kind)
        start = self._take(length * dtype.itemsize)
        values: MetadataValue = np.frombuffer(self._data, dtype, length, start).tolist()
        return values

    def _strings(self, length: int) -> MetadataValue:
        """The same as `_string` in a loop without calls: a vocabulary is 100 000 of them."""
        data, size, at = self._data, self._size, self._at
        length_at = struct.Struct("<Q").unpack_from
        strings: list[MetadataValue] = []
        for _ in range(length):
            start = at + 8
            if start > size:
                break
            at = start + length_at(data, at)[0]
            if at > size:
                break
            strings.append(data[start:at].decode("utf-8", "replace"))
        self._at = min(at, size)
        if len(strings) != length:
            self._take(size)
        return strings

    def _scalar_dtype(self, kind: int) -> np.dtype[Any]:
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path}: unknown metadata type {kind} at {self._at}")
        return _SCALARS[kind]

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        num_dims = self._unsigned(4)
        if not 1 <= num_dims <= _MAX_DIMS:
            raise CheckpointError(f"{self._path}: tensor {name} has {num_dims} dims")
        shape = tuple(self._unsigned(8) for _ in range(num_dims))[::-1]
        return name, shape, self._unsigned(4), self._unsigned(8)

    def _tensor(
        self, data_start: int, name: str, shape: tuple[int, ...], kind: int, offset: int
    ) -> GgufTensor:
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise CheckpointError(
                f"{self._path}: tensor {name} has the unknown type {kind}"
            ) from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        num_elements = 1
        for length in shape:
            num_elements *= length
        if num_elements == 0 or shape[-1] % block_size:
            raise CheckpointError(f"{self._path}: tensor {name} has the impossible shape {shape}")
        num_bytes = num_elements // block_size * block_bytes
        if data_start + offset + num_bytes > self._size:
            raise CheckpointError(
                f"{self._path} is truncated: tensor {name} {shape} ends at byte "
                f"{data_start + offset + num_bytes}, the file has {self._size}; fetch it again"
            )
        return GgufTensor(name, shape, quantization, data_start + offset, num_bytes)
