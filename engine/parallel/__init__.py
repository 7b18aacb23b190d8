"""Parallel axes, how their ranks talk, and the layers that are split over them.

What needs torch is imported when it is first asked for: whoever only reads a layout does not wait.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULES = {
    "Axis": "layout",
    "AxisGroup": "axes",
    "Collectives": "collectives",
    "CollectivesConfig": "collectives",
    "ParallelAxes": "axes",
    "ParallelLayout": "layout",
    "RankEnvironment": "environment",
    "RankGroup": "rank_group",
    "Traffic": "traffic",
    "TrafficReport": "traffic",
    "join_group": "rank_group",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _MODULES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
