"""What `make` runs, seen by a python that only notes how it is called."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = """#!/bin/sh
echo "$(basename "$0") $*" >> "{log}"
if test "$1 $2" = "-m venv"; then
  mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && cp "$0" "$3/bin/isthmus"
fi
"""


@pytest.fixture
def python(tmp_path: Path) -> Path:
    script = tmp_path / "system-python"
    script.write_text(PYTHON.format(log=tmp_path / "log"))
    script.chmod(0o755)
    return script


def made(target: str, python: Path) -> list[str]:
    """The calls that `make target` causes."""
    log = python.with_name("log")
    log.unlink(missing_ok=True)
    venv = python.with_name("venv")
    result = subprocess.run(
        ["make", *target.split(), f"VENV={venv}", f"PYTHON={python}", "TORCH_VARIANT=cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return log.read_text().splitlines()


def test_a_second_demo_installs_and_downloads_nothing(python: Path) -> None:
    first = made("demo ONCE=1", python)
    assert first[0] == "system-python deploy/bootstrap/check_python.py"
    assert first[1].startswith("system-python -m venv ")
    assert any("install_torch.py" in call for call in first)
    assert first[-2:] == ["python -m pip install --editable .", "isthmus demo --once"]
    assert made("demo ONCE=1", python) == ["isthmus demo --once"]
    assert made("demo", python) == ["isthmus demo"]


def test_what_tests_need_comes_on_top_of_what_the_demo_needs(python: Path) -> None:
    made("demo", python)
    calls = made("test", python)
    assert calls[0] == "python -m pip install --editable .[dev]"
    assert [call.split()[2] for call in calls[1:]] == ["pytest", "pytest"]
    levels = " ".join(calls[1:]).split()
    assert {"tests/unit", "tests/service", "tests/distributed", "tests/e2e", "tests/chaos"} <= set(
        levels
    )
    assert made("demo", python) == ["isthmus demo"]
