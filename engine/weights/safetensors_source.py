"""A Hugging Face directory's safetensors: one file, or shards named by an index."""

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from engine.checkpoint.fields import read_json
from engine.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOAT_DTYPES = {"F64", "F32", "BF16", "F16"}
_UNUSED_SUFFIX = "rotary_emb.inv_freq"
"""Old Llama checkpoints carry these; they follow from the configuration."""


class _TensorSlice(Protocol):
    """What `safetensors` (which has no type stubs) gives for one tensor."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, box: slice | tuple[slice, slice]) -> torch.Tensor: ...


class _TensorFile(Protocol):
    """What it gives for one file."""

    def keys(self) -> list[str]: ...

    def get_slice(self, name: str) -> _TensorSlice: ...


class SafetensorsSource:
    """Use it in a `with` block; tensors read stay valid after it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._files = ExitStack()
        self._file_of: dict[str, Path] = {}
        self._open_files: dict[Path, _TensorFile] = {}
        for path in _weight_files(directory):
            for name in self._open(path).keys():  # noqa: SIM118 (not a mapping)
                if name.endswith(_UNUSED_SUFFIX):
                    continue
                if name in self._file_of:
                    raise CheckpointError(f"{path}: {name} is in {self._file_of[name]} too")
                self._file_of[name] = path
        self.names = frozenset(self._file_of)

    def __enter__(self) -> "SafetensorsSource":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._files.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def location(self, name: str) -> str:
        return f"{self._file_of[name]}: {name}"

    def read(
        self, name: str, dim: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        view = self._slice(name)
        if view.get_dtype() not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{self.location(name)} is stored as {view.get_dtype()}, which is not read; "
                "use a checkpoint in F32, BF16 or F16, or a GGUF file"
            )
        return _cut(view, dim, start, length)

    def read_float8(self, name: str, dim: int, start: int, length: int | None) -> torch.Tensor:
        """The same for a tensor of float8_e4m3fn, which means nothing without its scales."""
        view = self._slice(name)
        if view.get_dtype() != "F8_E4M3":
            raise CheckpointError(
                f"{self.location(name)} is stored as {view.get_dtype()}, F8_E4M3 is expected"
            )
        return _cut(view, dim, start, length)

    def read_bytes(self, name: str, index: int) -> torch.Tensor:
        """Entry `index` of a tensor of bytes, whole."""
        view = self._slice(name)
        if view.get_dtype() != "U8":
            raise CheckpointError(
                f"{self.location(name)} is stored as {view.get_dtype()}, bytes are expected"
            )
        return view[index : index + 1][0]

    def _slice(self, name: str) -> _TensorSlice:
        return self._open_files[self._file_of[name]].get_slice(name)

    def _open(self, path: Path) -> _TensorFile:
        """Open one file; the library checks its header and that its size is what it says."""
        try:
            file: _TensorFile = self._files.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise CheckpointError(f"{path} is missing; fetch the checkpoint again") from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or not a safetensors file ({error}); fetch it again"
            ) from None
        self._open_files[path] = file
        return file


def _cut(view: _TensorSlice, dim: int, start: int, length: int | None) -> torch.Tensor:
    stop = view.get_shape()[dim] if length is None else start + length
    return view[start:stop] if dim == 0 else view[:, start:stop]


def _weight_files(directory: Path) -> list[Path]:
    """The files to read, in the order that transformers looks for them."""
    if (directory / _SINGLE).is_file():
        return [directory / _SINGLE]
    if (directory / _INDEX).is_file():
        return _indexed_files(directory)
    files = sorted(directory.glob("*.safetensors"))
    if len(files) == 1:
        return files
    raise CheckpointError(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _indexed_files(directory: Path) -> list[Path]:
    index = read_json(directory / _INDEX)
    names = index.values.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index.source} has no weight_map")
    files = set(names.values())
    for file in files:
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise CheckpointError(f"{index.source}: {file!r} is no name of a file beside it")
    return [directory / file for file in sorted(files)]
