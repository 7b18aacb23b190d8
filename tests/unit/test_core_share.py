"""Workers of one host share cores: an idle worker's may be borrowed, a busy one's may not."""

import os
import subprocess
import sys

import pytest

from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode
from engine.runtime.core_share import CoreShare, create_core_share, split_cores
from engine.runtime.engine import Abort, Submit
from tests.fakes.step_engine import make_engine

LOCAL = SequenceMode.LOCAL


@pytest.fixture
def fd():
    fd = create_core_share()
    yield fd
    os.close(fd)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(
    ("cores", "num_workers", "expected"),
    [
        ([0, 1], 2, [(0,), (1,)]),
        ([0, 1, 2], 2, [(0, 1), (2,)]),
        ([3, 1, 5, 7], 2, [(1, 3), (5, 7)]),
        ([0, 1], 3, [(0,), (1,), (0,)]),
        ([0, 1, 2, 3], 1, [(0, 1, 2, 3)]),
    ],
)
def test_cores_are_split_evenly(cores, num_workers, expected):
    assert split_cores(cores, num_workers) == expected


def test_a_worker_alone_uses_all_that_it_was_given():
    share = CoreShare([0, 1, 2])
    grant = share.begin_step()
    assert (grant.num_threads, grant.cores, grant.is_borrowing) == (3, frozenset({0, 1, 2}), False)
    assert CoreShare([0, 1, 2], max_threads=2).begin_step().num_threads == 2


def test_idle_cores_are_borrowed_and_given_back_at_the_next_step(fd):
    prefill, decode = CoreShare([0], fd=fd, slot=0), CoreShare([1], fd=fd, slot=1)
    grant = prefill.begin_step()
    assert (grant.cores, grant.is_borrowing) == (frozenset({0, 1}), True)
    assert decode.begin_step().cores == {1}
    grant = prefill.begin_step()
    assert (grant.cores, grant.is_borrowing) == (frozenset({0}), False)
    decode.rest()
    assert prefill.begin_step().cores == {0, 1}
    prefill.rest()
    assert decode.begin_step().cores == {0, 1}


def test_cores_of_a_closed_worker_are_not_lent(fd):
    prefill, decode = CoreShare([0], fd=fd, slot=0), CoreShare([1], fd=fd, slot=1)
    decode.close()
    assert prefill.begin_step().cores == {0}


def test_core_shared_by_a_busy_and_an_idle_worker_is_not_borrowed(fd):
    first, second, third = (CoreShare([core], fd=fd, slot=core) for core in (0, 1, 2))
    fourth = CoreShare([2], fd=fd, slot=3)
    third.begin_step()
    assert first.begin_step().cores == {0, 1}
    third.rest()
    fourth.rest()
    second.begin_step()
    assert first.begin_step().cores == {0, 2}


def test_worker_that_died_busy_lends_its_cores(fd):
    program = (
        "import sys; from engine.runtime.core_share import CoreShare;"
        "CoreShare([1], fd=int(sys.argv[1]), slot=1).begin_step()"
    )
    subprocess.run([sys.executable, "-c", program, str(fd)], check=True, pass_fds=[fd])
    clock = Clock()
    share = CoreShare([0], fd=fd, slot=0, monotonic=clock)
    assert share.begin_step().cores == {0}
    clock.now_s = 1.5
    assert share.begin_step().cores == {0, 1}


def test_an_engine_is_busy_from_its_first_step_until_it_rests(fd):
    other = CoreShare([1], fd=fd, slot=1)
    engine = make_engine(cores=CoreShare([0], fd=fd, slot=0))
    request = Request(
        request_id="a", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=3)
    )
    engine.apply(1, Submit(request, LOCAL))
    assert other.begin_step().cores == {0, 1}
    engine.step()
    assert other.begin_step().cores == {1}
    engine.rest()
    assert other.begin_step().cores == {0, 1}


def test_a_borrowing_step_computes_a_smaller_chunk(fd):
    other = CoreShare([1], fd=fd, slot=1)
    engine = make_engine(cores=CoreShare([0], fd=fd, slot=0), max_num_batched_tokens=64)
    request = Request(
        request_id="a",
        prompt_token_ids=tuple(range(200)),
        sampling=SamplingParams(max_tokens=3),
    )
    engine.apply(1, Submit(request, LOCAL))
    engine.step()  # 16 tokens for each of two threads
    assert engine.stats.num_prefill_tokens == 32
    other.begin_step()
    engine.step()
    assert engine.stats.num_prefill_tokens == 32 + 64


def test_bad_places_are_refused(fd):
    with pytest.raises(ValueError, match="home_cores"):
        CoreShare([])
    with pytest.raises(ValueError, match="home_cores"):
        CoreShare([64], fd=fd)
    with pytest.raises(ValueError, match="slot"):
        CoreShare([0], fd=fd, slot=64)


def test_a_step_with_decoding_sequences_computes_a_smaller_chunk():
    engine = make_engine(max_num_batched_tokens=100)  # 25 tokens a thread, one thread
    sampling = SamplingParams(max_tokens=50)
    engine.apply(
        1, Submit(Request(request_id="a", prompt_token_ids=(1,), sampling=sampling), LOCAL)
    )
    engine.step()
    prompt = tuple(range(300))
    engine.apply(
        2, Submit(Request(request_id="b", prompt_token_ids=prompt, sampling=sampling), LOCAL)
    )
    engine.step()
    assert engine.stats.num_prefill_tokens == 1 + 16  # of 25 one decodes; then whole blocks
    engine.apply(3, Abort("a"))
    engine.step()
    assert engine.stats.num_prefill_tokens == 1 + 16 + 96
