import os

import pytest

from deploy.launcher.core_plan import _cgroup_quota, thread_environment, usable_cores


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


def test_usable_cores_are_ours() -> None:
    assert usable_cores()
    assert set(usable_cores()) <= os.sched_getaffinity(0)
