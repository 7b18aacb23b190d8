"""Root-mean-square norm, alone or fused with the residual addition before it.

Shape suffixes: T tokens of this step, D model dim, F features of all heads.
"""

import torch

from engine.checkpoint.config import ModelConfig
from engine.checkpoint.form import NormForm
from engine.kernels.interface import Kernels
from engine.parallel.axes import AxisGroup
from engine.parallel.shard import ShardedModule, ShardSpec


class NormWeight(ShardedModule):
    """A norm's scale on its own, for norms that run inside another kernel.

    It is float32 where the norm's form is wide: kernels read from its dtype when to round.
    """

    weight_D: torch.Tensor

    def __init__(self, size: int, *, name: str, form: NormForm, span: range | None = None) -> None:
        span = range(size) if span is None else span
        super().__init__(
            (
                ShardSpec(
                    tensor=f"{name}.weight",
                    full_shape=(size,),
                    parameter="weight_D",
                    start=span.start,
                    length=len(span),
                ),
            )
        )
        self._offset = form.offset
        self._declare("weight_D", len(span), dtype=torch.float32 if form.is_wide else None)

    def pack(self, kernels: Kernels) -> None:
        if self._offset:
            self.weight_D += self._offset


class RmsNorm(NormWeight):
    """Normalises each token; replicated on every rank."""

    def __init__(
        self,
        size: int,
        config: ModelConfig,
        *,
        name: str,
        kernels: Kernels,
        eps: float | None = None,
    ) -> None:
        super().__init__(size, name=name, form=config.form.norm)
        self.eps = config.rms_norm_eps if eps is None else eps
        self._kernels = kernels

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self._kernels.rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: torch.Tensor, residual_TD: torch.Tensor) -> torch.Tensor:
        """residual_TD += x_TD in place; returns the norm of the sum."""
        return self._kernels.add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps)


class HeadsNorm(NormWeight):
    """Normalises all heads of a token together, while they are split over the tensor axis.

    `span` is this rank's features. One all-reduce of a number a token, where the axis has more
    than one rank. Where the same heads stand on several ranks, `is_counted` is true on one.
    """

    def __init__(
        self,
        size: int,
        span: range,
        config: ModelConfig,
        *,
        name: str,
        is_counted: bool,
        axis: AxisGroup,
        kernels: Kernels,
    ) -> None:
        super().__init__(size, name=name, form=config.form.norm, span=span)
        self._size = size
        self._is_counted = is_counted
        self._eps = config.rms_norm_eps
        self._axis = axis
        self._kernels = kernels

    def forward(self, x_TF: torch.Tensor) -> torch.Tensor:
        if self._axis.size == 1:
            return self._kernels.rms_norm(x_TF, self.weight_D, self._eps)
        wide_TF = x_TF.float()
        square_T1 = wide_TF.pow(2).sum(-1, keepdim=True) * self._is_counted
        scale_T1 = torch.rsqrt(self._axis.all_reduce(square_T1) / self._size + self._eps)
        return (self.weight_D * (wide_TF * scale_T1)).to(x_TF.dtype)
