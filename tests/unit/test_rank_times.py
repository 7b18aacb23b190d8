"""What is exported of the times of a worker's ranks."""

import pytest

from engine.runtime.rank_message import RankTimes
from mesh.metrics import bubble_share


def times(rank: int, step_s: float, busy_s: float) -> RankTimes:
    return RankTimes(rank=rank, num_steps=4, step_s=step_s, busy_s=busy_s)


def test_the_bubble_is_counted_over_the_time_that_plans_are_in_flight() -> None:
    """The last stage hears of a plan while it computes another: its own steps are shorter."""
    assert bubble_share([times(0, 10.0, 8.0), times(1, 7.0, 6.0)]) == pytest.approx(0.3)


def test_ranks_that_never_wait_have_no_bubble() -> None:
    assert bubble_share([times(0, 10.0, 10.0), times(1, 9.0, 9.0)]) == 0
    assert bubble_share([]) == 0


def test_a_follower_whose_times_are_newer_makes_no_bubble_negative() -> None:
    assert bubble_share([times(0, 1.0, 0.5), times(1, 3.0, 2.0)]) == 0
