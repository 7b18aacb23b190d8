"""Prefixes through a store: what comes back is what was computed; nobody waits for the store."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from grpc import StatusCode, aio

from decode_worker.stream import Degraded, GatewayStream
from engine.errors import DeadlineError, DuplicateRequestError, PeerUnavailableError
from engine.request import Request, SamplingParams
from engine.runtime.commands import PrefixFetchEvent, SequenceMode
from engine.scheduling.block_hash import block_hashes
from kv_transfer import local_sending_rank
from kv_transfer.config import DataPlane
from kv_transfer.handover import Handover
from kv_transfer.local_sending_rank import LocalLink
from kv_transfer.plane import WritePermit
from kv_transfer.prefix import fetcher as fetcher_module
from kv_transfer.prefix import publisher as publisher_module
from kv_transfer.prefix import stores as stores_module
from kv_transfer.prefix.publisher import PrefixPublisher
from kv_transfer.sending_rank import Written
from kv_transfer.store.servicer import KvStoreServicer
from mesh.channel import open_channel
from protos.isthmus.v1 import kv_store_pb2 as pb
from protos.isthmus.v1 import kv_store_pb2_grpc as pb_grpc
from protos.isthmus.v1.registry_pb2 import WORKER_ROLE_STORE, WorkerRecord
from tests.fakes.kv_store import (
    DIGEST,
    SIZE,
    SharingWorker,
    StoreProcess,
    expected_kv,
    running_store,
    sharing_worker,
)
from tests.service.test_kv_transfer_handover import until

PROMPT = list(range(100, 180))
"""Five blocks."""
IDLE = (0, 0, 0, 0)


async def published(worker: SharingWorker, num_prefixes: int = 1) -> None:
    await until(lambda: sum(worker.publisher.outcomes.values()) >= num_prefixes)


async def knows_store(worker: SharingWorker) -> None:
    await until(lambda: worker.stores.choose(b"x") is not None)


async def turn(
    worker: SharingWorker, prompt: Sequence[int], *, max_tokens: int = 1, request_id: str = "r"
) -> list[int]:
    """A request to its end; returns prompt and answer."""
    sink = await worker.generate(prompt, max_tokens=max_tokens, request_id=request_id)
    return [*prompt, *sink.tokens(request_id)]


def fetch_event(sink) -> PrefixFetchEvent:
    event = sink.events[0]
    assert isinstance(event, PrefixFetchEvent), "it comes before all others"
    return event


@pytest.mark.parametrize("plane", [DataPlane.SHM, DataPlane.TCP])
async def test_next_turn_on_another_worker_computes_only_what_is_new(redis, redis_url, plane):
    async with running_store(redis, plane=plane) as store:
        async with sharing_worker(redis_url, plane=plane) as first:
            conversation = await turn(first, PROMPT, max_tokens=40)
            await published(first)
            assert first.publisher.outcomes == {"published": 1}
        kept = (len(conversation) - 1) // SIZE * SIZE
        assert kept == 112, "prompt and answer, all but the last token, whose KV nobody computed"
        async with sharing_worker(redis_url, plane=plane) as second:
            question = [*conversation, *range(300, 310)]
            sink = await second.generate(question, max_tokens=1)
            assert second.thread.stats.num_prefill_tokens == len(question) - kept
            assert second.cached_kv(question) == expected_kv(question, 128)
            event = fetch_event(sink)
            assert (event.decision, event.reason) == ("fetch", "unmeasured")
            assert (event.num_tokens, event.num_bytes) == (kept, kept * 192)
            await published(second)
            await until(lambda: second.num_free_blocks == 64)
            second.scheduler.check_conservation()
        assert store.held == IDLE
        assert store.servicer.num_fetched_blocks == kept // SIZE
        store.blocks.shelf.check_conservation()


async def test_prefill_worker_publishes_when_its_handover_is_over(redis, redis_url):
    async with running_store(redis) as store, sharing_worker(redis_url) as worker:
        sink = worker.start(PROMPT, mode=SequenceMode.PREFILL)
        await sink.wait_for_tokens("r", 1)
        assert worker.publisher.outcomes == {}
        await worker.engine.release("r")
        await published(worker)
        assert store.blocks.num_leading(block_hashes(PROMPT, SIZE)) == 5


async def test_what_the_store_has_is_not_sent_again(redis, redis_url):
    async with running_store(redis) as store, sharing_worker(redis_url) as worker:
        await turn(worker, PROMPT, request_id="a")
        await turn(worker, PROMPT, request_id="b")
        await turn(worker, [*PROMPT, *range(500, 520)], request_id="c")
        await published(worker, 3)
        assert worker.publisher.outcomes == {"published": 2, "known": 1}
        assert worker.publisher.num_tokens == 96
        assert store.blocks.shelf.num_accepted == 6
        assert store.held == IDLE


async def test_two_workers_bring_one_prefix_once(redis, redis_url):
    async with (
        running_store(redis) as store,
        sharing_worker(redis_url) as first,
        sharing_worker(redis_url) as second,
    ):
        await asyncio.gather(turn(first, PROMPT), turn(second, PROMPT))
        await published(first)
        await published(second)
        assert store.blocks.shelf.num_accepted == 5
        assert first.publisher.num_tokens + second.publisher.num_tokens == 80
        assert store.held == IDLE


async def test_worker_that_ends_publishes_what_waits(redis, redis_url):
    async with running_store(redis) as store:
        async with sharing_worker(redis_url) as worker:
            for index in range(8):
                await turn(worker, range(index, 64 + index), request_id=str(index))
        assert store.blocks.shelf.num_accepted == 8 * 4
        assert store.held == IDLE


async def test_slow_store_costs_prefixes_and_no_request(redis, redis_url, monkeypatch):
    monkeypatch.setattr(publisher_module, "MAX_WAITING", 2)
    gate = asyncio.Event()
    push = Handover.push

    async def slow(self, *rest, **named):
        await gate.wait()
        return await push(self, *rest, **named)

    monkeypatch.setattr(Handover, "push", slow)
    async with running_store(redis) as store, sharing_worker(redis_url, num_blocks=200) as worker:
        for index in range(5):
            await turn(worker, range(index, 64 + index), request_id=str(index))
        assert worker.publisher.outcomes["queue_full"] >= 2
        gate.set()
        await published(worker, 5)
        assert worker.publisher.outcomes["published"] >= 2
        assert store.held == IDLE


async def test_publishing_that_takes_too_long_gives_the_blocks_back(redis, redis_url, monkeypatch):
    monkeypatch.setattr(publisher_module, "PUBLISH_S", 0.05)
    entered = asyncio.Event()

    async def stuck(self, *rest):
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Handover, "push", stuck)
    async with running_store(redis) as store, sharing_worker(redis_url) as worker:
        await knows_store(worker)
        await turn(worker, PROMPT, request_id="a")
        await published(worker)
        assert entered.is_set()
        assert worker.publisher.outcomes == {"too_slow": 1}
        worker.scheduler.check_conservation()
        assert worker.num_free_blocks == 64
        await turn(worker, range(300, 364), request_id="b")
        await published(worker, 2)
        assert worker.publisher.outcomes == {"too_slow": 1, "avoided": 1}
        await until(lambda: store.held == IDLE)


async def test_store_that_misses_a_deadline_is_not_tried_again_at_once(
    redis, redis_url, monkeypatch
):
    async def late(self, *rest):
        raise DeadlineError("no blocks in time")

    monkeypatch.setattr(Handover, "push", late)
    async with running_store(redis), sharing_worker(redis_url) as worker:
        await knows_store(worker)
        await turn(worker, PROMPT, request_id="a")
        await published(worker)
        assert worker.stores.are_avoided
        assert worker.publisher.outcomes == {"DeadlineError": 1}


# The store goes away, or is full.


async def test_requests_go_on_when_the_store_dies(redis, redis_url):
    async with sharing_worker(redis_url) as worker:
        async with running_store(redis) as store:
            await knows_store(worker)
            await turn(worker, PROMPT, request_id="a")
            await published(worker)
            known = worker.stores.choose(b"x")
        assert known is not None
        assert store.blocks.shelf.num_filed == 5
        # The registry may be late: as if it still named the store.
        worker.stores._stores[known.store_id] = type(known)(_record(known.store_id, known.address))
        sink = await worker.generate(range(600, 700), request_id="b")
        assert (fetch_event(sink).decision, fetch_event(sink).reason) == (
            "compute",
            "peer_unavailable",
        )
        assert sink.is_over("b")
        assert worker.fetcher.decisions["compute", "peer_unavailable"] == 1
        sink = await worker.generate(range(700, 800), request_id="c")
        assert fetch_event(sink).reason == "avoided", "it is not asked for a while"


async def test_store_that_does_not_answer_is_waited_for_once(redis, redis_url, monkeypatch):
    async def hangs(self, request, context):
        await asyncio.Event().wait()

    monkeypatch.setattr(KvStoreServicer, "Query", hangs)
    async with running_store(redis), sharing_worker(redis_url) as worker:
        await knows_store(worker)
        sink = await worker.generate(PROMPT, request_id="a")
        event = fetch_event(sink)
        assert (event.decision, event.reason) == ("compute", "deadline")
        assert event.end_ns - event.start_ns < 2e9
        stream = GatewayStream(worker.engine, worker.receiver)
        request = Request(
            request_id="b",
            prompt_token_ids=(*range(700, 800),),
            sampling=SamplingParams(max_tokens=1),
        )
        stream.submit(request, SequenceMode.LOCAL, trace_context=None)
        assert await stream.next_outputs() == [Degraded("b", "prefix_fetch", "avoided")]
        await stream.drained()
        assert worker.fetcher.decisions == {("compute", "deadline"): 1, ("compute", "avoided"): 1}
        await published(worker, 2)
        assert worker.publisher.outcomes == {"avoided": 2}


async def test_full_store_drops_the_oldest_prefix(redis, redis_url):
    async with running_store(redis, num_blocks=10) as store, sharing_worker(redis_url) as worker:
        prompts = [list(range(start, start + 64)) for start in (0, 200, 400)]
        for index, prompt in enumerate(prompts):
            await turn(worker, prompt, request_id=str(index))
            await published(worker, index + 1)
        held = [store.blocks.num_leading(block_hashes(prompt, SIZE)) for prompt in prompts]
        assert held == [2, 4, 4], "the tail of the oldest went"
        assert store.blocks.shelf.num_evicted == 2
        sink = await worker.generate(range(1, 400), request_id="long")  # 24 blocks
        await published(worker, 4)
        assert sink.is_over("long")
        assert worker.publisher.outcomes["CapacityError"] == 1
        assert store.held == IDLE


async def test_spilled_prefix_comes_back_from_disk(redis, redis_url, tmp_path):
    prompts = [list(range(start, start + 64)) for start in (0, 200, 400)]
    async with running_store(redis, num_blocks=4, spill_dir=tmp_path) as store:
        async with sharing_worker(redis_url) as first:
            for index, prompt in enumerate(prompts):
                await turn(first, prompt, request_id=str(index))
                await published(first, index + 1)
        assert [store.blocks.num_leading(block_hashes(p, SIZE)) for p in prompts] == [4, 4, 4]
        async with sharing_worker(redis_url) as second:
            await knows_store(second)
            await second.generate([*prompts[0], 7], request_id="again")
            assert second.thread.stats.num_prefill_tokens == 1
            assert second.cached_kv(prompts[0]) == expected_kv(prompts[0], 64)
        assert store.held == IDLE
    async with running_store(redis, num_blocks=4, spill_dir=tmp_path) as store:
        assert store.blocks.num_leading(block_hashes(prompts[1], SIZE)) == 4, "also after a restart"


async def test_damaged_file_shortens_the_prefix(redis, redis_url, tmp_path):
    hashes = block_hashes(PROMPT, SIZE)
    async with running_store(redis, num_blocks=5, spill_dir=tmp_path) as store:
        async with sharing_worker(redis_url) as first:
            await turn(first, PROMPT, request_id="a")
            await turn(first, range(500, 580), request_id="b")
            await published(first, 2)
        path = tmp_path / f"{hashes[2].hex()}.kv"
        await until(path.exists)
        data = bytearray(path.read_bytes())
        data[40] ^= 1
        path.write_bytes(data)
        async with sharing_worker(redis_url) as second:
            await knows_store(second)
            sink = await second.generate([*PROMPT, 7], request_id="again")
            assert fetch_event(sink).num_tokens == 2 * SIZE
            assert fetch_event(sink).reason == "incomplete"
            assert fetch_event(sink).has_failed
            assert second.thread.stats.num_prefill_tokens == 81 - 2 * SIZE
            assert second.cached_kv(PROMPT) == expected_kv(PROMPT, 80)
        assert store.blocks.spill is not None
        assert store.blocks.spill.dropped == {"damaged": 1}
        assert store.held == IDLE


async def test_store_gives_what_its_memory_has_room_for(redis, redis_url, tmp_path):
    """The rest stays on disk: others are reading what else is in memory."""
    other = list(range(500, 580))
    async with running_store(redis, num_blocks=5, spill_dir=tmp_path) as store:
        async with sharing_worker(redis_url) as first:
            await turn(first, PROMPT, request_id="a")
            await published(first)
            await turn(first, other, request_id="b")
            await published(first, 2)
        async with (
            store.blocks.reading(block_hashes(other, SIZE)[:3]) as read,
            sharing_worker(redis_url) as second,
        ):
            assert len(read) == 3
            await knows_store(second)
            sink = await second.generate([*PROMPT, 7], request_id="again")
            assert (fetch_event(sink).decision, fetch_event(sink).reason) == ("fetch", "incomplete")
            assert fetch_event(sink).num_tokens == 2 * SIZE
            assert second.cached_kv(PROMPT) == expected_kv(PROMPT, 80)
        assert store.held == IDLE
        store.blocks.shelf.check_conservation()


# The store leaves while it is asked.


class NoStores:
    """A registry that has lost its stores."""

    def workers(self, role) -> list[WorkerRecord]:
        return []

    def on_change(self, callback) -> None:
        pass


def lose_stores(worker: SharingWorker) -> None:
    worker.stores._source = NoStores()
    worker.stores.refresh()


@pytest.mark.parametrize("method", ["Query", "Fetch"])
async def test_request_goes_on_when_the_store_leaves_while_it_is_asked(
    redis, redis_url, monkeypatch, method
):
    is_stored, entered = asyncio.Event(), asyncio.Event()
    answer = getattr(KvStoreServicer, method)

    async def hangs(self, request, context):
        if not is_stored.is_set():
            return await answer(self, request, context)
        entered.set()
        return await asyncio.Event().wait()

    monkeypatch.setattr(KvStoreServicer, method, hangs)
    monkeypatch.setattr(stores_module, "QUERY_TIMEOUT_S", 60.0)
    monkeypatch.setattr(stores_module, "CLOSE_GRACE_S", 0.01)
    monkeypatch.setattr(fetcher_module, "FIRST_TIMEOUT_S", 60.0)
    async with running_store(redis) as store:
        await stored(store, redis_url)
        is_stored.set()
        async with sharing_worker(redis_url) as worker, asyncio.timeout(20):
            await knows_store(worker)
            sink = worker.start([*PROMPT, 7])
            await entered.wait()
            lose_stores(worker)
            await sink.wait_until_over("r")
            event = fetch_event(sink)
            assert (event.decision, event.reason) == ("compute", "peer_unavailable")
            assert event.has_failed
            assert worker.fetcher.decisions == {("compute", "peer_unavailable"): 1}
            await worker.generate([*PROMPT, 7])  # the id is free again
            await until(lambda: worker.num_free_blocks == 64)


async def test_store_that_left_between_two_calls_is_a_peer_that_is_gone(redis, redis_url):
    async with running_store(redis), sharing_worker(redis_url) as worker:
        await knows_store(worker)
        store = worker.stores.choose(b"x")
        assert store is not None
        await store.aclose()
        with pytest.raises(PeerUnavailableError, match="has left the mesh"):
            await store.query([b"h" * 32])


async def test_fetch_is_finished_when_its_store_leaves_the_registry_first(
    redis, redis_url, monkeypatch
):
    entered, gate = asyncio.Event(), asyncio.Event()
    fetch = KvStoreServicer.Fetch

    async def held_back(self, request, context):
        entered.set()
        await gate.wait()
        return await fetch(self, request, context)

    monkeypatch.setattr(KvStoreServicer, "Fetch", held_back)
    async with running_store(redis) as store:
        await stored(store, redis_url)
        async with sharing_worker(redis_url) as worker:
            await knows_store(worker)
            sink = worker.start([*PROMPT, 7])
            await entered.wait()
            lose_stores(worker)
            await asyncio.sleep(0)  # it begins to close
            gate.set()
            await sink.wait_until_over("r")
            assert fetch_event(sink).num_tokens == 80


# Aborts.


async def stored(store: StoreProcess, redis_url: str, prompt: Sequence[int] = PROMPT) -> None:
    async with sharing_worker(redis_url) as worker:
        await turn(worker, prompt)
        await published(worker)


@pytest.mark.parametrize("plane", [DataPlane.SHM, DataPlane.TCP])
async def test_abort_in_the_middle_of_a_fetch_frees_both_sides(
    redis, redis_url, monkeypatch, plane
):
    async with running_store(redis, plane=plane) as store:
        await stored(store, redis_url)
        entered, gate = threading.Event(), threading.Event()
        write = LocalLink._write

        def held_back(link: LocalLink, *rest: Any) -> Written:
            entered.set()
            gate.wait(10)
            return write(link, *rest)

        monkeypatch.setattr(local_sending_rank, "QUICK_BYTES", 0)  # in a thread, as large ones are
        monkeypatch.setattr(LocalLink, "_write", held_back)
        async with sharing_worker(redis_url, plane=plane) as worker:
            await knows_store(worker)
            sink = worker.start([*PROMPT, 7])
            await asyncio.to_thread(entered.wait)
            assert store.blocks.shelf.num_pinned == 5
            assert worker.num_free_blocks == 64 - 5
            aborting = asyncio.create_task(worker.engine.abort("r"))
            await asyncio.sleep(0)
            gate.set()
            await aborting
            assert worker.num_free_blocks == 64
            assert worker.fetcher.num_open == 0
            await until(lambda: store.held == IDLE, timeout_s=2)
            assert sink.events == []
            assert worker.thread.num_cached_blocks(block_hashes(PROMPT, SIZE)) == 0, (
                "half a prefix is none"
            )
            sink = await worker.generate([*PROMPT, 7])  # the id is free again
            assert worker.cached_kv(PROMPT) == expected_kv(PROMPT, 80)


async def test_no_abort_returns_before_the_blocks_of_its_fetch_are_free(
    redis, redis_url, monkeypatch
):
    """Neither a second one nor one that is cancelled."""
    entered, ending, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def hangs(self, request, context):
        entered.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(KvStoreServicer, "Fetch", hangs)
    async with running_store(redis) as store:
        await stored(store, redis_url)
        async with sharing_worker(redis_url) as worker:
            end = worker.receiver.abort

            async def slow(request_id: str) -> int:
                ending.set()
                await gate.wait()
                return await end(request_id)

            monkeypatch.setattr(worker.receiver, "abort", slow)
            await knows_store(worker)
            worker.start([*PROMPT, 7])
            await entered.wait()
            aborts = [asyncio.create_task(worker.engine.abort("r"))]
            await ending.wait()
            aborts.append(asyncio.create_task(worker.engine.abort("r")))
            aborts[0].cancel()
            ended, _ = await asyncio.wait(aborts, timeout=0.1)
            assert not ended
            with pytest.raises(DuplicateRequestError):
                worker.start([*PROMPT, 7])
            gate.set()
            await aborts[1]
            assert worker.num_free_blocks == 64
            with pytest.raises(asyncio.CancelledError):
                await aborts[0]


@pytest.mark.parametrize("plane", [DataPlane.SHM, DataPlane.TCP])
async def test_write_of_a_store_that_missed_the_abort_reaches_no_block(
    redis, redis_url, monkeypatch, plane
):
    """As if its host hung: it writes on after the worker has used the blocks for something else."""
    async with running_store(redis, plane=plane) as store:
        await stored(store, redis_url)
        entered, gate = threading.Event(), threading.Event()
        write = LocalLink._write

        def late(link: LocalLink, *rest: Any) -> Written:
            entered.set()
            gate.wait(10)
            return write(link, *rest)

        async with sharing_worker(redis_url, plane=plane, num_blocks=8) as worker:
            await knows_store(worker)
            with monkeypatch.context() as hung:
                hung.setattr(local_sending_rank, "QUICK_BYTES", 0)
                hung.setattr(LocalLink, "_write", late)
                hung.setattr(WritePermit, "check", lambda permit: None)
                worker.start([*PROMPT, 7])
                await asyncio.to_thread(entered.wait)
                async with asyncio.timeout(5):
                    await worker.engine.abort("r")
                other = list(range(700, 813))  # needs every block of the pool
                await worker.generate(other, request_id="other")
                assert worker.cached_kv(other) == expected_kv(other, 112)
                gate.set()
                await until(lambda: store.servicer.num_fetches == 0)
                await until(lambda: store.held == IDLE)
            assert worker.cached_kv(other) == expected_kv(other, 112)


async def test_worker_that_dies_in_the_middle_of_a_fetch_leaves_no_pins(
    redis, redis_url, monkeypatch
):
    async with running_store(redis) as store:
        await stored(store, redis_url)
        entered, gate = threading.Event(), threading.Event()
        write = LocalLink._write

        def held_back(link: LocalLink, *rest: Any) -> Written:
            entered.set()
            gate.wait(10)
            return write(link, *rest)

        monkeypatch.setattr(local_sending_rank, "QUICK_BYTES", 0)  # in a thread, as large ones are
        monkeypatch.setattr(LocalLink, "_write", held_back)
        async with sharing_worker(redis_url) as worker:
            await knows_store(worker)
            worker.start([*PROMPT, 7])
            await asyncio.to_thread(entered.wait)
            asyncio.get_running_loop().call_later(0.05, gate.set)
        await until(lambda: store.held == IDLE, timeout_s=5)
        store.blocks.shelf.check_conservation()


async def test_random_aborts_leave_nothing_behind(redis, redis_url):
    async with running_store(redis) as store:
        await stored(store, redis_url)
        async with sharing_worker(redis_url) as worker:
            await knows_store(worker)
            free = worker.num_free_blocks
            for index in range(40):
                # Distinct continuations of one prefix that must be fetched, cut at any point.
                worker.start([*PROMPT, index, 7], max_tokens=20, request_id=str(index))
                await asyncio.sleep(index * 0.0004)
                await worker.engine.abort(str(index))
                assert not worker.scheduler.is_known(f"{index}/prefix")
            await published(worker)
            await until(lambda: worker.publisher.num_waiting == 0)
            await until(lambda: worker.num_free_blocks == free)
            await until(lambda: store.held == IDLE, timeout_s=2)
            worker.scheduler.check_conservation()


# What is asked of the store is checked.


async def answer_of(store: StoreProcess, method: str, request) -> aio.AioRpcError:
    async with open_channel(store.address) as channel:
        stub = pb_grpc.KvStoreServiceStub(channel)
        with pytest.raises(aio.AioRpcError) as caught:
            await getattr(stub, method)(request, timeout=5)
    return caught.value


async def test_bad_questions_are_refused(redis, redis_url):
    async with running_store(redis) as store:
        error = await answer_of(store, "Query", pb.QueryRequest(model_digest="other"))
        assert error.code() is StatusCode.FAILED_PRECONDITION
        assert error.details() == f"the store holds KV of model {DIGEST}, not of other"
        error = await answer_of(
            store, "Query", pb.QueryRequest(model_digest=DIGEST, block_hashes=[b"short"])
        )
        assert error.code() is StatusCode.INVALID_ARGUMENT
        far = pb.FetchRequest(model_digest=DIGEST, first_block=1 << 30)
        error = await answer_of(store, "Fetch", far)
        assert error.code() is StatusCode.INVALID_ARGUMENT


async def test_fetch_for_nobody_is_refused_and_pins_nothing(redis, redis_url):
    async with running_store(redis) as store, sharing_worker(redis_url) as worker:
        await turn(worker, PROMPT)
        await published(worker)
        request = pb.FetchRequest(
            fetch_id="unasked",
            worker_id="somebody",
            address=worker.fetcher.address,
            model_digest=DIGEST,
            block_hashes=block_hashes(PROMPT, SIZE),
        )
        free = worker.num_free_blocks
        error = await answer_of(store, "Fetch", request)
        assert error.code() is not StatusCode.OK
        await until(lambda: store.held == IDLE and worker.num_free_blocks == free, timeout_s=5)


def _record(store_id: str, address: str):
    return WorkerRecord(
        worker_id=store_id, role=WORKER_ROLE_STORE, address=address, model_digest=DIGEST
    )


async def test_two_requests_with_one_prefix_fetch_it_once(redis, redis_url):
    async with running_store(redis) as store:
        await stored(store, redis_url)
        async with sharing_worker(redis_url) as worker:
            await knows_store(worker)
            sinks = [worker.start([*PROMPT, 7 + i], request_id=str(i)) for i in range(3)]
            for index, sink in enumerate(sinks):
                await sink.wait_until_over(str(index))
            assert worker.fetcher.decisions == {
                ("fetch", "unmeasured"): 1,
                ("compute", "cached"): 2,
            }
            assert store.servicer.num_fetched_blocks == 5
            assert worker.thread.stats.num_prefill_tokens == 3
            assert worker.cached_kv(PROMPT) == expected_kv(PROMPT, 80)


async def test_a_bug_in_the_fetch_costs_no_request(redis, redis_url, caplog):
    async with running_store(redis), sharing_worker(redis_url) as worker:
        await knows_store(worker)
        worker.fetcher.cost = None  # type: ignore[assignment]
        sink = await worker.generate(PROMPT)
        assert sink.is_over("r")
        assert "prefix not fetched" in caplog.text
        event = fetch_event(sink)
        assert (event.decision, event.reason, event.has_failed) == ("compute", "error", True)
        assert worker.fetcher.decisions == {("compute", "error"): 1}


async def test_a_bug_in_the_publisher_costs_one_prefix(redis, redis_url, monkeypatch, caplog):
    push = PrefixPublisher._push

    async def bug(*args):
        monkeypatch.setattr(PrefixPublisher, "_push", push)
        raise RuntimeError("a bug")

    monkeypatch.setattr(PrefixPublisher, "_push", bug)
    async with running_store(redis) as store, sharing_worker(redis_url) as worker:
        await turn(worker, PROMPT, request_id="a")
        await published(worker)
        await turn(worker, range(300, 364), request_id="b")
        await published(worker, 2)
        assert worker.publisher.outcomes == {"error": 1, "published": 1}
        assert "prefix not published" in caplog.text
        assert worker.num_free_blocks == 64
        assert store.held == IDLE


async def test_store_forgets_the_memory_of_workers_that_are_gone(redis, redis_url):
    async with running_store(redis) as store:
        await stored(store, redis_url)
        for number in range(2):
            async with sharing_worker(redis_url) as worker:
                await knows_store(worker)
                await worker.generate([*PROMPT, number])
                assert len(store.sender._peers) == 1
            await until(lambda: not store.sender._peers)


async def test_fetch_behind_tokens_that_the_caller_lacks_is_refused(redis, redis_url):
    """Else the store would fill the gap with blocks of somebody else."""
    async with running_store(redis) as store:
        await stored(store, redis_url)
        async with sharing_worker(redis_url) as worker:
            hashes = block_hashes(PROMPT, SIZE)
            taken = await worker.thread.take_prefix("f", hashes)
            lender = worker.fetcher._lender
            lender.expect("f", taken)
            request = pb.FetchRequest(
                fetch_id="f",
                worker_id=worker.fetcher._worker_id,
                address=worker.fetcher.address,
                model_digest=DIGEST,
                first_block=2,
                block_hashes=hashes[2:],
            )
            error = await answer_of(store, "Fetch", request)
            assert error.code() is StatusCode.FAILED_PRECONDITION
            assert "holds 0 tokens of the 32 before" in (error.details() or "")
            await worker.receiver.abort("f")
            await worker.thread.cancel_reservation("f")
            assert worker.thread.num_cached_blocks(hashes) == 0
            assert store.held == IDLE
