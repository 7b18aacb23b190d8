"""FP8 matrices with a scale for each block of rows and columns, read as floats (DeepSeek-V3).

X.weight is float8_e4m3fn [F, D]; X.weight_scale_inv is float32 [F / block, D / block], rounded up.

Source: DeepSeek-AI 2024, "DeepSeek-V3", section 3.3.2; inference/kernel.py of its repository.
"""

from types import TracebackType

import torch

from engine.errors import CheckpointError
from engine.weights.safetensors_source import SafetensorsSource

_SCALE_SUFFIX = "_scale_inv"


class BlockScaled:
    """Use it in a `with` block, which closes `inner`; tensors without scales pass through."""

    def __init__(self, inner: SafetensorsSource, block_shape: tuple[int, int]) -> None:
        self._inner = inner
        self._block_shape = block_shape
        self.path = inner.path
        scales = {name for name in inner.names if name.endswith(_SCALE_SUFFIX)}
        self._scaled = {name.removesuffix(_SCALE_SUFFIX) for name in scales}
        self.names = inner.names - scales
        for name in sorted(self._scaled & self.names):
            self._check(name)

    def __enter__(self) -> "BlockScaled":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inner.__exit__(kind, error, traceback)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._inner.shape(name)

    def location(self, name: str) -> str:
        return self._inner.location(name)

    def read(
        self, name: str, dim: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        if name not in self._scaled:
            return self._inner.read(name, dim, start, length)
        values = self._inner.read_float8(name, dim, start, length)
        scales = self._inner.read(name + _SCALE_SUFFIX).float()
        for axis, block in enumerate(self._block_shape):
            first = start if axis == dim else 0
            index = torch.arange(first, first + values.shape[axis]) // block
            scales = scales.index_select(axis, index)
        return values.float() * scales

    def _check(self, name: str) -> None:
        shape, scales = self.shape(name), self.shape(name + _SCALE_SUFFIX)
        needed = tuple(
            -(-size // block) for size, block in zip(shape, self._block_shape, strict=False)
        )
        if len(shape) != len(self._block_shape) or scales != needed:
            raise CheckpointError(
                f"{self.location(name)} of shape {list(shape)} does not go with scales of shape "
                f"{list(scales)} for blocks of {list(self._block_shape)}"
            )
