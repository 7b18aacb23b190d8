"""One environment may set up a whole mesh: a role passes over what is meant for another."""

import os
import subprocess
import sys

import pytest

from mesh.settings import MESH_SECTIONS, PREFIX

ONE_OF_EACH_SECTION = {
    "gateway": ("MAX_NUM_SEQUENCES", "8"),
    "recovery": ("MAX_NUM_ATTEMPTS", "2"),
    "worker": ("DRAIN_GRACE_S", "1"),
    "engine": ("NUM_THREADS", "1"),
    "transfer": ("LEASE_S", "5"),
    "collectives": ("COLLECTIVE_TIMEOUT_S", "9"),
    "store": ("MEMORY_BYTES", "1000000"),
}


@pytest.mark.parametrize("role", ["gateway", "prefill_worker", "decode_worker", "kv_transfer"])
def test_a_role_takes_the_environment_of_all(role: str) -> None:
    assert ONE_OF_EACH_SECTION.keys() == MESH_SECTIONS
    environment = {
        f"{PREFIX}{section.upper()}__{field}": value
        for section, (field, value) in ONE_OF_EACH_SECTION.items()
    }
    ended = subprocess.run(
        [sys.executable, "-m", role, "--model", "/nowhere/model.gguf"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.stderr.startswith("error: /nowhere/model.gguf does not exist")
