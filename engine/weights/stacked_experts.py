"""gpt-oss' experts, which are one tensor together, as a tensor for each expert and projection.

A layer's tensors are [E, ...]; gate and up stand in turns, feature by feature. Matrices are floats
[E, in, out], or MXFP4: blocks of 32 four-bit values [E, out, in / 32, 16] with a scale each
[E, out, in / 32].

Source: OCP Microscaling Formats v1.0, section 5; transformers 5.23, integrations/mxfp4.py.
"""

import re
from dataclasses import dataclass
from types import TracebackType

import torch

from engine.checkpoint.form import MAX_EXPERTS
from engine.errors import CheckpointError
from engine.weights.safetensors_source import SafetensorsSource

_STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(|_blocks|_scales|_bias)")
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127
_BLOCK_SIZE = 32


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an expert's tensor comes from: features `first`, `first + step`, ... of its part."""

    tensor: str
    expert: int
    first: int
    step: int
    is_matrix: bool


class StackedExperts:
    """Use it in a `with` block, which closes `inner`; other tensors pass through.

    An expert's matrix is read whole, also where a slice of it is wanted.
    """

    def __init__(self, inner: SafetensorsSource) -> None:
        self._inner = inner
        self.path = inner.path
        self._place_of: dict[str, _Place] = {}
        stacked = {name for name in inner.names if _STACKED.fullmatch(name)}
        for name in stacked:
            self._add(name)
        self.names = (inner.names - stacked) | self._place_of.keys()

    def __enter__(self) -> "StackedExperts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._inner.__exit__(kind, error, traceback)

    def shape(self, name: str) -> tuple[int, ...]:
        place = self._place_of.get(name)
        if place is None:
            return self._inner.shape(name)
        shape = self._inner.shape(place.tensor)
        if not place.is_matrix:
            return (shape[1] // place.step,)
        if place.tensor.endswith("_blocks"):
            return shape[1] // place.step, shape[2] * _BLOCK_SIZE
        return shape[2] // place.step, shape[1]

    def location(self, name: str) -> str:
        place = self._place_of.get(name)
        if place is None:
            return self._inner.location(name)
        return f"{self._inner.location(place.tensor)}, expert {place.expert}"

    def read(
        self, name: str, dim: int = 0, start: int = 0, length: int | None = None
    ) -> torch.Tensor:
        place = self._place_of.get(name)
        if place is None:
            return self._inner.read(name, dim, start, length)
        values = self._whole(place)[place.first :: place.step]
        return values.narrow(dim, start, values.shape[dim] - start if length is None else length)

    def _whole(self, place: _Place) -> torch.Tensor:
        """All features of the expert's tensor, as rows."""
        if place.tensor.endswith("_blocks"):
            scales = place.tensor.removesuffix("_blocks") + "_scales"
            return dequantized(
                self._inner.read_bytes(place.tensor, place.expert),
                self._inner.read_bytes(scales, place.expert),
            )
        part = self._inner.read(place.tensor, 0, place.expert, 1)[0]
        return part.mT if place.is_matrix else part

    def _add(self, tensor: str) -> None:
        match = _STACKED.fullmatch(tensor)
        assert match is not None
        prefix, projection, kind = match.groups()
        shape = self._inner.shape(tensor)
        num_dims = {"": 3, "_blocks": 4, "_scales": 3, "_bias": 2}[kind]
        if len(shape) != num_dims or not 1 <= shape[0] <= MAX_EXPERTS:
            raise CheckpointError(
                f"{self._inner.location(tensor)} of shape {list(shape)} does not hold 1 to "
                f"{MAX_EXPERTS} experts"
            )
        if kind == "_scales":
            return
        if kind == "_blocks":
            self._check_scales(tensor, shape)
        suffix = "bias" if kind == "_bias" else "weight"
        parts = ("gate_proj", "up_proj") if projection == "gate_up_proj" else ("down_proj",)
        for expert in range(shape[0]):
            for first, part in enumerate(parts):
                name = f"{prefix}.{expert}.{part}.{suffix}"
                self._place_of[name] = _Place(
                    tensor, expert, first, len(parts), is_matrix=kind != "_bias"
                )

    def _check_scales(self, blocks: str, shape: tuple[int, ...]) -> None:
        scales = blocks.removesuffix("_blocks") + "_scales"
        if scales not in self._inner.names:
            raise CheckpointError(f"{self.path} lacks {scales}; fetch it again")
        if shape[3] * 2 != _BLOCK_SIZE or self._inner.shape(scales) != shape[:3]:
            raise CheckpointError(
                f"{self._inner.location(blocks)} of shape {list(shape)} does not go with scales of "
                f"shape {list(self._inner.shape(scales))}"
            )


def dequantized(blocks_FN16: torch.Tensor, scales_FN: torch.Tensor) -> torch.Tensor:
    """MXFP4 as float32 [F, N * 32]: the low half of a byte comes first.

    Shape suffixes: F features, N blocks, 16 bytes.
    """
    table = torch.tensor([*_VALUES, *(-value for value in _VALUES)])
    halves = torch.stack((blocks_FN16 & 0xF, blocks_FN16 >> 4), -1).flatten(2)
    values = table[halves.int()]
    exponents = scales_FN.int().sub_(_SCALE_BIAS).unsqueeze(-1)
    whole: torch.Tensor = torch.ldexp(values, exponents).flatten(1)
    return whole
