"""`pip install` of the tree puts everything that users import and run where the tree is not."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NEWEST_OLD_SETUPTOOLS = 76
"""pyproject.toml asks for a later one; without it pip has to fetch one."""


def pip_flags() -> list[str]:
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return []
    return ["--no-build-isolation"] if int(version.split(".")[0]) > NEWEST_OLD_SETUPTOOLS else []


def copied_tree(target: Path) -> Path:
    """What a clone has: a build must not write into the tree that is tested."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what belongs to the tree is not known")
    for name in filter(None, listed.stdout.split("\0")):
        source = ROOT / name
        if source.is_file() and not name.startswith("tests/"):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target / name)
    return target


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = copied_tree(tmp_path_factory.mktemp("tree"))
    target = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-deps", *pip_flags(), "--target", str(target), str(tree)),
        ],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if result.returncode and not pip_flags() and "No matching distribution" in result.stderr:
        pytest.skip("setuptools is old here and a newer one cannot be fetched")
    assert result.returncode == 0, result.stderr
    return target


def run(installed: Path, folder: Path, *arguments: str) -> str:
    """Python in an empty folder, with the installed tree in front of everything else."""
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_stubs_are_imported_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    code = (
        "from protos.isthmus.v1 import inference_pb2, inference_pb2_grpc\n"
        "inference_pb2.GenerateRequest(text='a')\n"
        "inference_pb2_grpc.InferenceStub\n"
        "print(inference_pb2_grpc.__file__)"
    )
    assert run(installed, tmp_path, "-c", code).startswith(str(installed))
    protos = installed / "protos" / "isthmus" / "v1"
    for suffix in (".proto", "_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
        for name in ("inference", "prefill", "decode", "kv_transfer", "sampling", "registry"):
            assert (protos / f"{name}{suffix}").is_file(), name


def test_the_command_line_runs(installed: Path, tmp_path: Path) -> None:
    assert "decode-worker" in run(installed, tmp_path, "-m", "deploy.cli", "--help")
    for module in ("gateway", "prefill_worker", "decode_worker"):
        assert "--redis-url" in run(installed, tmp_path, "-m", module, "--help"), module
    assert (installed / "bin" / "isthmus").is_file()
    assert (installed / "gateway" / "http" / "status.html").is_file()


def test_the_kernels_are_built_where_there_is_a_compiler(installed: Path, tmp_path: Path) -> None:
    library = installed / "engine" / "kernels" / "libisthmus.so"
    if not library.is_file():
        pytest.skip("no compiler: neither ziglang nor cc")
    code = f"import ctypes; ctypes.CDLL({str(library)!r})"
    run(installed, tmp_path, "-c", code)


def test_tests_are_not_installed(installed: Path) -> None:
    assert not (installed / "tests").exists()
