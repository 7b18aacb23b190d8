"""Ranks started as programs, by hand and by torchrun, find each other through the environment."""

import os
import socket
import subprocess
import sys

import pytest

from engine.parallel import RankEnvironment

PROGRAM = """
import os, torch
from engine.parallel import ParallelLayout, RankEnvironment, join_group

with join_group(ParallelLayout.parse("tp=2"), RankEnvironment.read(os.environ)) as group:
    total = group.axes.tp.all_reduce(torch.tensor([1.0 + group.rank]))
    print(f"rank {group.rank}: {total.item():g} over {group.transports['tp']}", flush=True)
"""
SAID = {"rank 0: 3 over shm", "rank 1: 3 over shm"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def start_rank(rank: int, port: int) -> subprocess.Popen[str]:
    place = RankEnvironment(
        rank=rank, world_size=2, local_rank=rank, master_address="127.0.0.1", master_port=port
    )
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | place.variables(),
        stdout=subprocess.PIPE,
        text=True,
    )


def test_programs_started_by_hand_find_each_other() -> None:
    port = free_port()
    ranks = [start_rank(rank, port) for rank in range(2)]
    try:
        assert {rank.communicate(timeout=60)[0].strip() for rank in ranks} == SAID
        assert [rank.returncode for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


@pytest.mark.slow
def test_torchrun_starts_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split("\n")) >= SAID
