from hypothesis import given
from hypothesis import strategies as st

from gateway.routing import Candidate, Choice, LeastLoaded, LoadBook
from protos.isthmus.v1.registry_pb2 import WorkerLoad, WorkerRecord


def candidate(worker_id, *, sequences=0, tokens=0, free=10, turn=0):
    return Candidate(worker_id, sequences, tokens, free, turn)


def record(**load):
    return WorkerRecord(worker_id="w", load=WorkerLoad(**load))


def test_the_shortest_queue_and_the_fewest_sequences_win():
    prefill = [candidate("p0", tokens=500), candidate("p1", tokens=20, sequences=9)]
    decode = [candidate("d0", sequences=2), candidate("d1", sequences=1, free=1)]
    assert LeastLoaded().choose(prefill, decode, 100) == Choice("p1", "d1")


def test_without_prefill_workers_there_is_none():
    assert LeastLoaded().choose([], [candidate("d0")], 1) == Choice(None, "d0")


def test_a_full_pool_comes_last():
    decode = [candidate("d0", sequences=0, free=0), candidate("d1", sequences=7)]
    assert LeastLoaded().choose([], decode, 1).decode == "d1"


def test_equals_take_turns():
    decode = [candidate("d0", turn=4), candidate("d1", turn=3)]
    assert LeastLoaded().choose([], decode, 1).decode == "d1"


def test_own_work_counts_before_any_report_shows_it():
    book = LoadBook()
    book.add(100, turn=1)
    assert book.candidate(record()).num_sequences == 1
    assert book.candidate(record()).num_queued_tokens == 100


def test_own_work_in_a_report_is_not_counted_twice():
    book = LoadBook()
    book.add(100, turn=1)
    load = book.candidate(record(num_running=1, num_waiting_tokens=100))
    assert (load.num_sequences, load.num_queued_tokens) == (1, 100)


def test_work_of_other_gateways_stays_when_own_work_ends():
    book = LoadBook()
    book.add(100, turn=1)
    report = record(num_running=3, num_waiting_tokens=150)
    book.candidate(report)
    book.remove(100)
    load = book.candidate(report)
    assert (load.num_sequences, load.num_queued_tokens) == (2, 50)


@given(st.lists(st.integers(1, 1000), max_size=20))
def test_all_that_is_added_and_removed_leaves_nothing(sizes):
    book = LoadBook()
    for turn, size in enumerate(sizes):
        book.add(size, turn)
    for size in sizes:
        book.remove(size)
    assert (book.num_sequences, book.num_tokens) == (0, 0)
