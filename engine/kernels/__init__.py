"""Fused operations of one device behind one Protocol; `choose_kernels` picks the implementation."""

import logging

import torch

from engine.kernels.interface import HeadShape, Kernels, PackedLinear
from engine.kernels.torch_kernels import TorchKernels

__all__ = ["HeadShape", "Kernels", "PackedLinear", "choose_kernels"]

logger = logging.getLogger(__name__)


def choose_kernels(device: torch.device, dtype: torch.dtype, num_threads: int) -> Kernels:
    """The fastest kernels for a device and dtype; logs which, and why when it is not the best.

    `num_threads` is the most CPU threads that any step will name; steps may name fewer.
    """
    kernels = TorchKernels(device)
    logger.info("kernels=%s dtype=%s max_threads=%d", kernels.name, dtype, num_threads)
    return kernels
