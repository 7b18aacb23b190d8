"""Fills a model built on the meta device: strict both ways, one module at a time."""

import torch
from torch import nn

from engine.errors import CheckpointError
from engine.kernels.interface import Kernels
from engine.parallel.shard import ShardedModule, ShardSpec
from engine.weights.source import WeightSource

_MAX_NAMES_SHOWN = 5


def load(
    model: nn.Module,
    weights: WeightSource,
    *,
    kernels: Kernels,
    device: torch.device,
    unused_tensors: tuple[str, ...] = (),
) -> None:
    """Read this rank's slices, convert them to the parameters' dtype, pack each module once.

    A module is packed before the next one is read, so that no more than one is held twice.

    Tensors whose names begin with one of `unused_tensors` may be there, and are not read.

    Raises:
        CheckpointError: names or shapes differ from the model's; the model is unusable then.
    """
    modules = [module for module in model.modules() if isinstance(module, ShardedModule)]
    _check_names(modules, weights, unused_tensors)
    _check_shapes(modules, weights)  # before anything is allocated: sizes are the file's
    for module in modules:
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty_like(parameter, device=device)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
        for shard in module.shards:
            _fill(module.get_parameter(shard.parameter), shard, weights)
        module.pack(kernels)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    assert not left, f"parameters without weights: {left}"


def _check_names(
    modules: list[ShardedModule], weights: WeightSource, unused: tuple[str, ...]
) -> None:
    """Both ways: what the model wants is there, and what is there is wanted by somebody."""
    wanted = {shard.tensor for module in modules for shard in module.shards}
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


def _shown(names: set[str] | frozenset[str]) -> str:
    shown = ", ".join(sorted(names)[:_MAX_NAMES_SHOWN])
    return shown if len(names) <= _MAX_NAMES_SHOWN else f"{shown} and {len(names) - 5} more"


def _check_shapes(modules: list[ShardedModule], weights: WeightSource) -> None:
    for shard in (shard for module in modules for shard in module.shards):
        shape = weights.shape(shard.tensor)
        if shape != shard.full_shape:
            raise CheckpointError(
                f"{weights.location(shard.tensor)} has shape {list(shape)}, the configuration "
                f"needs {list(shard.full_shape)}"
            )


def _fill(parameter: torch.Tensor, shard: ShardSpec, weights: WeightSource) -> None:
    values = weights.read(shard.tensor, shard.dim, shard.start, shard.length)
    parameter.narrow(shard.dim, shard.offset, shard.length).copy_(values)
