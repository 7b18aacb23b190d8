import pytest

from deploy.launcher.core_plan import _cgroup_quota, plan_home_cores, thread_environment


@pytest.mark.parametrize(
    ("num_cores", "num_workers", "expected"),
    [
        (2, 2, [(0,), (1,)]),
        (4, 2, [(0, 1), (2, 3)]),
        (5, 2, [(0, 1, 2), (3, 4)]),
        (1, 3, [(0,), (0,), (0,)]),
        (2, 3, [(0,), (1,), (0,)]),
    ],
)
def test_cores_are_split_evenly_with_one_each_at_least(num_cores, num_workers, expected) -> None:
    assert plan_home_cores(range(num_cores), num_workers) == expected


def test_every_core_has_a_home_when_there_are_enough() -> None:
    homes = plan_home_cores(range(17), 4)
    assert sorted(core for home in homes for core in home) == list(range(17))


def test_no_core_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one core"):
        plan_home_cores([], 1)


def test_waiting_threads_do_not_spin() -> None:
    environment = thread_environment(3)
    assert environment["OMP_NUM_THREADS"] == "3"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["GOMP_SPINCOUNT"] == "0"


@pytest.mark.parametrize(
    ("text", "quota"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("nonsense", None)]
)
def test_cgroup_quota_is_read(tmp_path, text, quota) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    assert _cgroup_quota(file) == quota
