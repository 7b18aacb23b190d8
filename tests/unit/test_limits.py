"""gRPC takes any option and ignores those it does not know: a name spelled wrong does nothing."""

import importlib.util
from pathlib import Path

import pytest

from mesh.limits import CHANNEL_OPTIONS, SERVER_OPTIONS


@pytest.mark.parametrize("name", sorted({name for name, _ in (*SERVER_OPTIONS, *CHANNEL_OPTIONS)}))
def test_grpcs_core_knows_the_option(name: str) -> None:
    core = importlib.util.find_spec("grpc._cython.cygrpc")
    assert core is not None
    assert core.origin is not None
    assert name.encode() + b"\0" in Path(core.origin).read_bytes()
