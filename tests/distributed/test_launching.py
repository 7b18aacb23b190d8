"""Ranks started as programs, by hand and by torchrun, find each other through the environment."""

import os
import socket
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
from torch._C._distributed_c10d import TCPStore

from engine.errors import CollectiveTimeoutError, RankDeadError
from engine.parallel import CollectivesConfig, ParallelLayout, RankEnvironment, join_group

PROGRAM = """
import os, sys, torch
from engine.parallel import ParallelLayout, RankEnvironment, join_group

with join_group(ParallelLayout.parse("tp=2"), RankEnvironment.read(os.environ)) as group:
    total = group.axes.tp.all_reduce(torch.tensor([1.0 + group.rank]))
    line = f"rank {group.rank}: {total.item():g} over {group.transports['tp']}\\n"
    sys.stdout.write(line)  # at once: ranks may share a pipe
    sys.stdout.flush()
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


def open_store(place: RankEnvironment) -> str:
    try:
        place.open_store(timeout_s=2)
    except (ValueError, CollectiveTimeoutError) as error:
        return str(error)
    return "joined"


def test_two_workers_with_one_address_are_told_of_each_other() -> None:
    first, second = (
        RankEnvironment(
            rank=rank, world_size=2, local_rank=rank, master_address="127.0.0.1", master_port=port
        )
        for port in [free_port()]
        for rank in range(2)
    )
    keeper = first.open_store(timeout_s=10)
    told = open_store(first)
    assert f"rank 0 cannot keep the ranks' store on 127.0.0.1:{first.master_port}" in told
    assert "Each needs a MASTER_PORT of its own" in told
    assert open_store(second) == "joined"
    other = replace(second, world_size=3)
    told = open_store(other)
    own = f"process {os.getpid()} on {socket.gethostname()} with WORLD_SIZE"
    assert f"rank 1 of the worker at 127.0.0.1:{first.master_port} is {own} 2, so it" in told
    assert f"cannot be {own} 3" in told
    del keeper


def test_a_rank_whose_rank_0_is_not_there_says_where_it_looked() -> None:
    place = RankEnvironment(
        rank=1, world_size=2, local_rank=1, master_address="127.0.0.1", master_port=free_port()
    )
    told = open_store(place)
    assert f"rank 1 did not find its rank 0 on 127.0.0.1:{place.master_port}" in told


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


def test_a_rank_that_never_starts_is_told() -> None:
    place = RankEnvironment(
        rank=0, world_size=2, local_rank=0, master_address="127.0.0.1", master_port=free_port()
    )
    config = CollectivesConfig(join_timeout_s=0.2)
    with pytest.raises(CollectiveTimeoutError, match=r"not all ranks came within 0.2 s.*place/1"):
        join_group(ParallelLayout.parse("tp=2"), place, config=config)


def test_a_store_that_is_lost_before_all_ranks_came_is_told() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = RankEnvironment(
        rank=0,
        world_size=2,
        local_rank=0,
        master_address="127.0.0.1",
        master_port=store.port,
        is_store_elsewhere=True,
    )
    errors: list[RankDeadError] = []

    def join() -> None:
        try:
            join_group(ParallelLayout.parse("tp=2"), place)
        except RankDeadError as error:
            errors.append(error)

    thread = threading.Thread(target=join)
    thread.start()
    store.get("isthmus/0/place/0")  # it waits for rank 1 now
    del store
    thread.join(30)
    assert [error.operation for error in errors] == ["join"]
    assert "store was lost before all had come" in str(errors[0])
