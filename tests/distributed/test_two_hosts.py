"""Ranks on two hosts, each of which knows its own name as a loopback address, as Debian has it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from benchmarks.moving.namespaces import HOSTS, Link, are_possible, slow_link

pytestmark = pytest.mark.skipif(not are_possible(), reason="needs root, ip and tc")

NAMES = ("isthmus-first", "isthmus-second")
MEMBER = """
import json, os, torch
from engine.parallel import CollectivesConfig, ParallelLayout, RankEnvironment, join_group

torch.set_num_threads(1)
config = CollectivesConfig(has_shared_memory=False)  # namespaces of one machine could share it
layout = ParallelLayout.parse("tp=2,pp=2")
with join_group(layout, RankEnvironment.read(os.environ), config=config) as group:
    x = torch.full((5,), group.rank + 1.0)
    group.axes.tp.all_reduce(x)
    group.axes.world.all_reduce(x)
    y = torch.full((3,), float(group.rank))
    if group.axes.pp.rank == 0:
        group.axes.pp.send(y, 1)
    else:
        group.axes.pp.receive(y, 0)
    group.axes.world.barrier()
    print(json.dumps([x.tolist(), y.tolist()]))
"""


@pytest.fixture
def hosts() -> Iterator[Link]:
    """Two namespaces, with a hosts file each."""
    with ExitStack() as stack:
        link = stack.enter_context(slow_link(1000))
        for own, (name, other) in enumerate(((link.near, HOSTS[1]), (link.far, HOSTS[0]))):
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(shutil.rmtree, folder)
            lines = ["127.0.0.1 localhost", f"127.0.1.1 {NAMES[own]}", f"{other} {NAMES[1 - own]}"]
            (folder / "hosts").write_text("\n".join(lines) + "\n")
        yield link


def test_a_group_over_two_hosts_that_take_their_own_names_for_the_loopback(hosts: Link) -> None:
    meeting = {"WORLD_SIZE": "4", "MASTER_ADDR": NAMES[0], "MASTER_PORT": "29500"}
    ranks = [
        subprocess.Popen(
            hosts.inside((hosts.near, hosts.far)[rank // 2], [sys.executable, "-c", MEMBER]),
            env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank % 2)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        found = [json.loads(rank.communicate(timeout=60)[0]) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert found == [[[20.0] * 5, [float(rank % 2)] * 3] for rank in range(4)]
