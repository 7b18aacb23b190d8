"""How gRPC's core runs is set before anything imports it, in every process of ours."""

import os
import subprocess
import sys

import pytest

SETTINGS = ("GRPC_VERBOSITY", "GRPC_ENABLE_FORK_SUPPORT", "GRPC_EXPERIMENTS")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    "module",
    ["gateway.__main__", "prefill_worker.__main__", "decode_worker.__main__", "deploy.cli"],
)
def test_a_process_imports_mesh_before_grpc(module: str) -> None:
    code = f"import sys, {module}; names = list(sys.modules)"
    code += "; print('mesh' in names[: names.index('grpc') if 'grpc' in names else None])"
    assert run(code).stdout == "True\n"


def test_the_core_knows_what_is_asked_of_it() -> None:
    """An experiment that a new gRPC no longer has would be an error line at every start."""
    assert run("import mesh, grpc; grpc.insecure_channel('127.0.0.1:1').close()").stderr == ""


def test_what_the_operator_has_set_stands() -> None:
    code = "import mesh, os; print(os.environ['GRPC_VERBOSITY'])"
    assert run(code, GRPC_VERBOSITY="debug").stdout == "debug\n"
