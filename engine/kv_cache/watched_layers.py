"""A pool's layers that tell how far a forward pass has come."""

from collections.abc import Callable
from typing import Protocol

import torch


class Layers(Protocol):
    """A pool: see `engine.kv_cache.pool.KvPool.layer`."""

    def layer(self, index: int) -> torch.Tensor: ...


class WatchedLayers:
    """For one pass: whoever asks for a layer has written the ones before it."""

    def __init__(
        self,
        layers: Layers,
        interval: int,
        num_layers: int,
        on_layers: Callable[[int], None],
    ) -> None:
        """`on_layers` is told of the first 1 * interval, 2 * interval, ... layers."""
        self._layers = layers
        self._interval = interval
        self._num_layers = num_layers
        self._on_layers = on_layers

    def layer(self, index: int) -> torch.Tensor:
        if index and index % self._interval == 0:
            self._on_layers(index)
        return self._layers.layer(index)

    def end(self) -> None:
        """The pass is over."""
        self._on_layers(self._num_layers)
