"""Parallel axes and the layers that are split over them."""

from engine.parallel.axes import AxisGroup, ParallelAxes

__all__ = ["AxisGroup", "ParallelAxes"]
