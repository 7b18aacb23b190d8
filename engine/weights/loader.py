"""Fills a model built on the meta device: strict both ways, one module at a time."""

from collections.abc import Mapping, Set

import torch
from torch import nn

from engine.errors import CheckpointError
from engine.kernels.interface import Kernels
from engine.parallel.shard import ShardedModule, ShardSpec
from engine.weights.source import WeightSource

_MAX_NAMES_SHOWN = 5


def tensors_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of each checkpoint tensor that `model` reads from."""
    return {shard.tensor: shard.full_shape for module in _modules(model) for shard in module.shards}


def load(
    model: nn.Module,
    weights: WeightSource,
    tensors: Mapping[str, tuple[int, ...]] | None = None,
    *,
    kernels: Kernels,
    device: torch.device,
    unused_tensors: tuple[str, ...] = (),
) -> None:
    """Read this rank's slices, convert them to the parameters' dtype, pack each module once.

    A module is packed before the next one is read, so that no more than one is held twice.

    Args:
        model: what stands on this rank, on the meta device.
        weights: the checkpoint.
        tensors: all that the checkpoint must hold, for this rank and others; by default, what
            this rank reads. All ranks of a worker find the same fault in a checkpoint.
        kernels: pack the weights.
        device: where the weights go.
        unused_tensors: tensors whose names begin with one of these may be there, and are not read.

    Raises:
        CheckpointError: names or shapes differ from `tensors`; the model is unusable then.
    """
    tensors = tensors_of(model) if tensors is None else tensors
    assert tensors.items() >= tensors_of(model).items(), "this rank reads what the model has not"
    _check_names(tensors.keys(), weights, unused_tensors)
    _check_shapes(tensors, weights)  # before anything is allocated: sizes are the file's
    for module in _modules(model):
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty_like(parameter, device=device)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
        for shard in module.shards:
            _fill(module.get_parameter(shard.parameter), shard, weights)
        module.pack(kernels)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parameters without weights: {left}"


def _modules(model: nn.Module) -> list[ShardedModule]:
    return [module for module in model.modules() if isinstance(module, ShardedModule)]


def _check_names(wanted: Set[str], weights: WeightSource, unused: tuple[str, ...]) -> None:
    """Both ways: what the model wants is there, and what is there is wanted by somebody."""
    if missing := wanted - weights.names:
        raise CheckpointError(f"{weights.path} lacks {_shown(missing)}; fetch it again")
    surplus = {
        name for name in weights.names - wanted - {"lm_head.weight"} if not name.startswith(unused)
    }
    if surplus:
        raise CheckpointError(
            f"{weights.path} holds {_shown(surplus)}, which a model of this configuration does not "
            "have; does config.json belong to these weights?"
        )


def _shown(names: Set[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_NAMES_SHOWN])
    return shown if len(names) <= _MAX_NAMES_SHOWN else f"{shown} and {len(names) - 5} more"


def _check_shapes(tensors: Mapping[str, tuple[int, ...]], weights: WeightSource) -> None:
    for tensor, needed in tensors.items():
        shape = weights.shape(tensor)
        if shape != needed:
            raise CheckpointError(
                f"{weights.location(tensor)} has shape {list(shape)}, the configuration "
                f"needs {list(needed)}"
            )


def _fill(parameter: torch.Tensor, shard: ShardSpec, weights: WeightSource) -> None:
    values = weights.read(shard.tensor, shard.dim, shard.start, shard.length)
    parameter.narrow(shard.dim, shard.offset, shard.length).copy_(values)
