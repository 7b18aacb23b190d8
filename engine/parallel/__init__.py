"""Parallel axes, how their ranks talk, and the layers that are split over them."""

from engine.parallel.axes import AxisGroup, ParallelAxes
from engine.parallel.collectives import Collectives, CollectivesConfig
from engine.parallel.environment import RankEnvironment
from engine.parallel.layout import Axis, ParallelLayout
from engine.parallel.rank_group import RankGroup, join_group
from engine.parallel.traffic import Traffic, TrafficReport

__all__ = [
    "Axis",
    "AxisGroup",
    "Collectives",
    "CollectivesConfig",
    "ParallelAxes",
    "ParallelLayout",
    "RankEnvironment",
    "RankGroup",
    "Traffic",
    "TrafficReport",
    "join_group",
]
