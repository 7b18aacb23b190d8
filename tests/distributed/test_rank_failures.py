"""A rank that dies, stops or goes its own way: every other rank is told who and where, in time."""

import math
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import RankGroupError
from engine.parallel import CollectivesConfig, RankGroup
from tests.distributed.ranks import RankProcesses, run_ranks

SHM = CollectivesConfig(collective_timeout_s=1.5)
TCP = CollectivesConfig(collective_timeout_s=4.0, has_shared_memory=False)
TRANSPORTS = [pytest.param(SHM, id="shm"), pytest.param(TCP, id="gloo")]
VICTIM = 1
SOON_S = {True: 1.0, False: 8.0}
"""How soon a death shows: ranks of one host see it, others see a number that stands still."""


def told(error: RankGroupError, start_s: float) -> dict[str, Any]:
    return {
        "error": type(error).__name__,
        "rank": error.rank,
        "operation": error.operation,
        "text": str(error),
        "seconds": time.monotonic() - start_s,
    }


def reduce_until_told(
    group: RankGroup, signal_number: int, num_elements: int, num_calls: int
) -> dict[str, Any]:
    x = torch.ones(num_elements)
    for _ in range(num_calls):
        group.axes.tp.all_reduce(x)
    if group.rank == VICTIM:
        os.kill(os.getpid(), signal_number)
    start_s = time.monotonic()
    try:
        for _ in range(1000):
            group.axes.tp.all_reduce(x)
    except RankGroupError as error:
        return told(error, start_s)
    return {}


@pytest.mark.parametrize("config", TRANSPORTS)
@pytest.mark.parametrize("num_elements", [16, 1_000_000])
def test_a_killed_rank_is_named_by_all_others(config: CollectivesConfig, num_elements: int) -> None:
    with RankProcesses(
        3, reduce_until_told, signal.SIGKILL, num_elements, 5, config=config
    ) as ranks:
        for found in ranks.results([0, 2]):
            assert found["error"] == "RankDeadError"
            assert (found["rank"], found["operation"]) == (VICTIM, "tp all_reduce")
            assert found["text"] == "tp all_reduce: rank 1 is dead"
            assert found["seconds"] < SOON_S[config.has_shared_memory]


@pytest.mark.parametrize("config", TRANSPORTS)
def test_a_stopped_rank_is_named_after_the_time_out(config: CollectivesConfig) -> None:
    with RankProcesses(4, reduce_until_told, signal.SIGSTOP, 16, 5, config=config) as ranks:
        for found in ranks.results([0, 2, 3]):
            assert found["error"] == "CollectiveTimeoutError"
            assert (found["rank"], found["operation"]) == (VICTIM, "tp all_reduce")
            timeout_s = config.collective_timeout_s
            assert found["text"] == f"tp all_reduce: rank 1 did not come within {timeout_s:g} s"
            assert found["seconds"] < timeout_s + SOON_S[config.has_shared_memory]


def reduce_for_ever(group: RankGroup, is_going: Event) -> dict[str, Any]:
    x = torch.ones(2_000_000)
    try:
        while True:
            group.axes.tp.all_reduce(x)
            if group.rank == 0 and not is_going.is_set():  # a rank may stop with its lock
                is_going.set()
    except RankGroupError as error:
        return told(error, time.monotonic())


@pytest.mark.parametrize("config", TRANSPORTS)
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_signal_in_the_middle_of_a_large_transfer(
    config: CollectivesConfig, signal_number: signal.Signals
) -> None:
    is_going = multiprocessing.get_context("forkserver").Event()
    with RankProcesses(3, reduce_for_ever, is_going, config=config) as ranks:
        assert is_going.wait(60)
        ranks.kill(VICTIM, signal_number)
        errors = {signal.SIGKILL: "RankDeadError", signal.SIGSTOP: "CollectiveTimeoutError"}
        for found in ranks.results([0, 2]):
            assert (found["error"], found["rank"]) == (errors[signal_number], VICTIM)


def wait_in_a_chain(group: RankGroup) -> dict[str, Any]:
    axis = group.axes.pp
    x = torch.zeros(4)
    axis.barrier()
    start_s = time.monotonic()
    if axis.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    try:
        axis.receive(x, axis.rank - 1)
        axis.send(x, axis.rank + 1)
    except RankGroupError as error:
        return told(error, start_s)
    return {}


def test_in_a_pipeline_the_stage_that_all_wait_for_is_to_blame() -> None:
    with RankProcesses("pp=4", wait_in_a_chain, config=SHM) as ranks:
        for found in ranks.results([1, 2, 3]):
            assert (found["error"], found["rank"]) == ("CollectiveTimeoutError", 0)
            assert found["operation"] == "pp receive"


def abort_while_others_wait(group: RankGroup, is_told: Event) -> dict[str, Any]:
    group.axes.world.barrier()
    start_s = time.monotonic()
    if group.rank == 2:
        group.abort("no checkpoint here")
    try:
        group.axes.tp.all_reduce(torch.ones(4))
    except RankGroupError as error:
        found = told(error, start_s)
        if group.rank == 2:
            is_told.wait(60)  # its death must not be what wakes the others
        return found
    return {}


@pytest.mark.parametrize("config", TRANSPORTS)
def test_an_abort_wakes_every_rank_of_every_axis(config: CollectivesConfig) -> None:
    is_told = multiprocessing.get_context("forkserver").Event()
    with RankProcesses("tp=2,dp=2", abort_while_others_wait, is_told, config=config) as ranks:
        found = ranks.results([0, 1, 3])
        is_told.set()
        found += ranks.results([2])
    text = "tp all_reduce: rank 2 called the group off: no checkpoint here"
    # Ranks 0 and 1 may be through with their call before they hear of it.
    assert {each.get("text", text) for each in found} == {text}
    assert [each["rank"] for each in found[2:]] == [2, 2]
    assert max(each["seconds"] for each in found[2:]) < 0.9 * config.collective_timeout_s


def leave_early(group: RankGroup) -> dict[str, Any]:
    group.axes.tp.barrier()
    if group.rank == 0:
        return {}
    start_s = time.monotonic()
    try:
        group.axes.tp.all_reduce(torch.ones(4))
    except RankGroupError as error:
        return told(error, start_s)
    return {}


@pytest.mark.parametrize("config", TRANSPORTS)
def test_a_rank_that_left_is_not_waited_for(config: CollectivesConfig) -> None:
    found = run_ranks(3, leave_early, config=config)
    for rank in (1, 2):
        assert (found[rank]["error"], found[rank]["rank"]) == ("RankDeadError", 0)


def close_and_live_on(group: RankGroup, is_told: Event) -> dict[str, Any]:
    group.axes.tp.barrier()
    if group.rank == 0:
        group.close()
        is_told.wait(60)
        return {}
    start_s = time.monotonic()
    try:
        group.axes.tp.all_reduce(torch.ones(4))
    except RankGroupError as error:
        return told(error, start_s)
    return {}


def test_a_rank_that_closed_its_group_is_not_waited_for() -> None:
    is_told = multiprocessing.get_context("forkserver").Event()
    with RankProcesses(3, close_and_live_on, is_told, config=SHM) as ranks:
        for found in ranks.results([1, 2]):
            assert found["text"] == "tp all_reduce: rank 0 has left the group"
            assert found["seconds"] < SHM.collective_timeout_s
        is_told.set()


def stop_while_waiting(group: RankGroup, is_told: Event) -> dict[str, Any]:
    axis, x, start_s = group.axes.pp, torch.zeros(4), time.monotonic()
    try:
        if axis.rank == 0:
            axis.receive(x, 1)
        elif axis.rank == 1:
            stop = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP))
            stop.start()
            axis.receive(x, 2)
        else:
            is_told.wait(60)
    except RankGroupError as error:
        return told(error, start_s)
    return {}


def test_a_rank_stopped_while_it_waited_is_to_blame_and_not_who_it_waited_for() -> None:
    is_told = multiprocessing.get_context("forkserver").Event()
    with RankProcesses("pp=3", stop_while_waiting, is_told, config=SHM) as ranks:
        found = ranks.results([0])[0]
        assert (found["error"], found["rank"]) == ("CollectiveTimeoutError", 1)
        is_told.set()


def call_something_else(group: RankGroup, what: str) -> dict[str, Any]:
    axis, x = group.axes.tp, torch.ones(6)
    start_s = time.monotonic()
    try:
        if axis.rank == 0:
            axis.all_reduce(x)
        elif what == "operation":
            axis.all_gather(x)
        elif what == "size":
            axis.all_reduce(torch.ones(5))
        else:
            axis.all_reduce(x.to(torch.float16))
    except RankGroupError as error:
        return told(error, start_s)
    return {}


@pytest.mark.parametrize("what", ["operation", "size", "dtype"])
def test_ranks_that_call_different_things_are_told(what: str) -> None:
    for found in run_ranks(2, call_something_else, what, config=SHM):
        assert found["error"] == "CollectiveAbortedError"
        assert " met " in found["text"]
        assert found["seconds"] < 1


@pytest.mark.parametrize("what", ["operation", "size"])
def test_ranks_of_several_hosts_that_call_different_things_are_told(what: str) -> None:
    for found in run_ranks(2, call_something_else, what, config=TCP):
        assert found["error"] == "CollectiveAbortedError"
        assert "is in another call" in found["text"]
        assert found["seconds"] < 0.5 * TCP.collective_timeout_s


def send_another_size(group: RankGroup, operation: str) -> dict[str, Any]:
    axis, start_s = group.axes.tp, time.monotonic()
    try:
        if operation == "all_to_all":
            axis.all_to_all(torch.ones(4), [2, 2], [2, 2] if axis.rank else [2, 1])
        elif axis.rank == 0:
            axis.send(torch.ones(4), 1)
            axis.barrier()
        else:
            axis.receive(torch.ones(3), 0)
    except RankGroupError as error:
        return told(error, start_s)
    return {}


@pytest.mark.parametrize("operation", ["send", "all_to_all"])
def test_a_size_that_was_not_expected_is_never_copied(operation: str) -> None:
    found = run_ranks(2, send_another_size, operation, config=SHM)
    told_ranks = [each for each in found if each]
    assert told_ranks
    assert all("another number of bytes" in each["text"] for each in told_ranks)


def check_until_told(group: RankGroup) -> dict[str, Any]:
    group.axes.world.barrier()
    if group.rank == VICTIM:
        os.kill(os.getpid(), signal.SIGKILL)
    start_s = time.monotonic()
    while time.monotonic() < start_s + 20:
        try:
            group.check()
        except RankGroupError as error:
            return told(error, start_s)
    return {}


def test_an_idle_rank_finds_a_dead_one() -> None:
    with RankProcesses(3, check_until_told, config=SHM) as ranks:
        for found in ranks.results([0, 2]):
            assert (found["error"], found["rank"]) == ("RankDeadError", VICTIM)
            assert found["operation"] == "check"


def follow(group: RankGroup, is_rank_0_killed: bool) -> Any:
    world = group.axes.world
    world.barrier()
    start_s = time.monotonic()
    data = None
    if group.rank == 0:
        if is_rank_0_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        while time.monotonic() < start_s + 1.5 * SHM.collective_timeout_s:
            group.check()
        data = b"step"
    try:
        return world.broadcast_bytes(data, max_bytes=100, timeout_s=math.inf)
    except RankGroupError as error:
        return told(error, start_s)


@pytest.mark.parametrize("config", TRANSPORTS)
def test_followers_wait_as_long_as_the_leader_lives(config: CollectivesConfig) -> None:
    assert run_ranks(3, follow, False, config=config) == [b"step"] * 3


@pytest.mark.parametrize("config", TRANSPORTS)
def test_followers_do_not_outlive_the_leader(config: CollectivesConfig) -> None:
    with RankProcesses(3, follow, True, config=config) as ranks:
        for found in ranks.results([1, 2]):
            assert (found["error"], found["rank"]) == ("RankDeadError", 0)
            assert found["operation"] == "world broadcast"


def test_nothing_is_left_in_shared_memory_by_killed_ranks() -> None:
    before = set(Path("/dev/shm").glob("*isthmus*"))
    with RankProcesses(3, reduce_until_told, signal.SIGKILL, 16, 5, config=SHM) as ranks:
        ranks.results([0, 2])
    assert set(Path("/dev/shm").glob("*isthmus*")) == before
