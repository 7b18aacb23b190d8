import time
from collections.abc import Callable

import torch

from engine.parallel import AxisGroup, Traffic, TrafficReport


class Background:
    """Collectives that take as long to begin and to finish a sum as they are told."""

    name = "background"
    is_in_background = True

    def __init__(self, begin_s: float, finish_s: float) -> None:
        self._begin_s, self._finish_s = begin_s, finish_s

    def begin_all_reduce(self, x: torch.Tensor) -> Callable[[], None]:
        spend(self._begin_s)

        def finish() -> None:
            spend(self._finish_s)
            x.mul_(2)

        return finish


def spend(seconds: float) -> None:
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        pass


def test_only_what_is_waited_for_counts_of_a_sum_that_travels() -> None:
    axis = AxisGroup(0, 2, Background(0.01, 0.02))  # type: ignore[arg-type]
    assert axis.is_in_background
    start_s = time.perf_counter()
    total = axis.begin_all_reduce(torch.ones(6))
    spend(0.1)  # something else is computed
    assert total().tolist() == [2.0] * 6
    report, elapsed_s = axis.traffic.take(), time.perf_counter() - start_s
    assert (report.num_bytes, report.num_calls) == (24, 1)
    assert 0.03 <= report.seconds <= elapsed_s - 0.1


def test_one_rank_has_nothing_that_could_travel() -> None:
    assert not AxisGroup().is_in_background
    x = torch.ones(2)
    assert AxisGroup().begin_all_reduce(x)() is x


def test_traffic_is_counted_until_it_is_taken() -> None:
    traffic = Traffic()
    traffic.add(0.5, 100)
    traffic.add(0.25, 20)
    assert traffic.take() == TrafficReport(seconds=0.75, num_bytes=120, num_calls=2)
    assert traffic.take() == TrafficReport()


def test_waiting_for_what_was_begun_is_time_of_the_same_call() -> None:
    traffic = Traffic()
    traffic.add(0.25, 100)
    traffic.add_wait(0.5)
    assert traffic.take() == TrafficReport(seconds=0.75, num_bytes=100, num_calls=1)
