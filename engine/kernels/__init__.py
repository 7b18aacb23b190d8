"""Fused operations of one device behind one Protocol; `choose_kernels` picks the implementation."""

import logging

import torch

from engine.kernels.interface import HeadShape, Kernels, PackedLinear
from engine.kernels.native_kernels import DTYPE_CODES, NativeKernels
from engine.kernels.native_library import NativeLibrary
from engine.kernels.torch_kernels import TorchKernels

__all__ = ["HeadShape", "Kernels", "PackedLinear", "choose_kernels"]

logger = logging.getLogger(__name__)


def choose_kernels(device: torch.device, dtype: torch.dtype, num_threads: int) -> Kernels:
    """The fastest kernels for a device and dtype; logs which, and why when it is not the best.

    `num_threads` is the most CPU threads that any step will name; steps may name fewer.
    """
    kernels = _native_kernels(dtype) if device.type == "cpu" else None
    chosen: Kernels = kernels or TorchKernels(device)
    logger.info("kernels=%s dtype=%s max_threads=%d", chosen.name, dtype, num_threads)
    return chosen


def _native_kernels(dtype: torch.dtype) -> NativeKernels | None:
    if dtype not in DTYPE_CODES:
        logger.warning("no native kernels for %s: plain torch serves, several times slower", dtype)
        return None
    try:
        library = NativeLibrary()
    except OSError as error:
        logger.warning("no native kernels: plain torch serves, several times slower (%s)", error)
        return None
    return NativeKernels(library, dtype)
