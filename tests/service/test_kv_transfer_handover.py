"""A handover over real gRPC: what each end promises when the other one is late, wrong or gone."""

import asyncio
import itertools
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode, aio

from engine.errors import (
    CapacityError,
    DeadlineError,
    DuplicateRequestError,
    InvalidRequestError,
    KvCorruptionError,
    KvLeaseLostError,
    LayoutMismatchError,
    PeerUnavailableError,
    UnknownRequestError,
)
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode
from engine.scheduling.block_hash import block_hashes
from kv_transfer import local_sending_rank, stream
from kv_transfer.config import Checksums, DataPlane
from kv_transfer.copying import BlockCopies
from kv_transfer.handover import Handover
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.offer import PROTOCOL_VERSION
from kv_transfer.peer import Peer
from kv_transfer.plane import WriteStoppedError
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender, check_grant
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from mesh.status import error_from_rpc
from protos.isthmus.v1 import kv_transfer_pb2 as pb
from protos.isthmus.v1 import kv_transfer_pb2_grpc as pb_grpc
from tests.fakes.clock import FakeClock
from tests.fakes.descriptors import open_things
from tests.fakes.engine import FakeEngine, ListSink
from tests.fakes.kv_memory import TINY_LAYOUT, HostMemory
from tests.fakes.kv_pair import FAST, KvPair, kv_pair, serving

BLOCKS = [0, 1, 2, 3]


def handover_of(
    pair: KvPair, request_id: str = "r", num_tokens: int = 13, **more: Any
) -> AbstractAsyncContextManager[Handover]:
    return pair.sender.handover(
        request_id, decode_address=pair.address, num_tokens=num_tokens, **more
    )


async def complete(pair: KvPair, request_id: str = "r") -> Handover:
    async with handover_of(pair, request_id) as handover:
        await handover.push(BLOCKS, 0, 13)
        await handover.commit(7)
    return handover


def num_free(pair: KvPair) -> int:
    return pair.engine.stats.num_free_blocks


async def abort_on_decode(pair: KvPair, request_id: str) -> int:
    """As a decode worker does it: the fence first."""
    return await pair.receiver.abort(request_id) + await pair.engine.abort(request_id)


async def until(is_so, timeout_s: float = 10.0) -> None:
    """Let the loop run until something is so."""
    async with asyncio.timeout(timeout_s):
        while not is_so():  # noqa: ASYNC110 - threads and peers set no event here
            await asyncio.sleep(0.001)


# The handshake.


async def test_another_model_is_refused_with_both_sides_named() -> None:
    async with kv_pair(sender_digest="xyz") as pair:
        with pytest.raises(
            LayoutMismatchError, match=r"prefill-0 has .*xyz.* but decode-0 has .*abc"
        ):
            await pair.sender.open("r", decode_address=pair.address, num_tokens=13)
        assert num_free(pair) == 16
        assert pair.sender.counters.handovers == {"LayoutMismatchError": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 4},
        {"num_parts": 1},
        {"dtype": "float16"},
        {"dtype": "int8"},
        {"num_kv_heads": 1},
        {"head_dim": 4},
    ],
    ids=str,
)
async def test_another_layout_is_refused(change) -> None:
    async with kv_pair(sender_layout=replace(TINY_LAYOUT, **change)) as pair:
        with pytest.raises(LayoutMismatchError, match=f"{next(iter(change))}.*but"):
            await pair.sender.open("r", decode_address=pair.address, num_tokens=13)


async def test_another_protocol_version_is_refused() -> None:
    async with kv_pair() as pair, open_channel(pair.address) as channel:
        request = pb.HandshakeRequest(sender_id="p", model_digest="abc", protocol_version=99)
        request.layout.CopyFrom(
            pb.KvLayout(
                num_layers=3,
                num_kv_heads=2,
                head_dim=8,
                block_size_tokens=4,
                dtype="bfloat16",
                num_parts=2,
            )
        )
        with pytest.raises(
            aio.AioRpcError, match=rf"protocol 99.*but.*protocol {PROTOCOL_VERSION}"
        ) as failure:
            await pb_grpc.KvTransferServiceStub(channel).Handshake(request)
        assert failure.value.code() is StatusCode.FAILED_PRECONDITION


async def test_a_worker_is_greeted_once() -> None:
    async with kv_pair() as pair:
        reports = [(await complete(pair, f"r{index}")).report for index in range(3)]
        assert [report.num_handshakes for report in reports] == [1, 0, 0]


def offer_another_segment(pair: KvPair) -> None:
    (offer,) = pair.receiver._offers
    assert offer.shm is not None
    pair.receiver._offers = (replace(offer, shm=replace(offer.shm, nonce=bytes(16))),)


async def test_a_pool_on_another_host_is_reached_by_tcp_and_that_is_counted(monkeypatch) -> None:
    async with kv_pair(config=replace(FAST, data_plane=DataPlane.AUTO), plane="auto") as pair:
        offer_another_segment(pair)
        handover = await complete(pair)
        assert handover.report.data_plane == "tcp"
        assert pair.sender.counters.fallbacks == {"not_mappable": 1}


async def test_a_data_plane_that_was_asked_for_is_not_replaced() -> None:
    async with kv_pair("shm") as pair:
        offer_another_segment(pair)
        with pytest.raises(PeerUnavailableError, match="another host"):
            await pair.sender.open("r", decode_address=pair.address, num_tokens=13)


async def test_a_wildcard_data_address_means_the_host_of_the_grpc_server() -> None:
    async with kv_pair("tcp", config=replace(FAST, data_address="0.0.0.0:0")) as pair:
        assert (await complete(pair)).report.outcome == "committed"


# Reserve.


async def test_the_receivers_cached_prefix_is_not_sent() -> None:
    prompt = list(range(13))
    async with kv_pair() as pair:
        sink = ListSink()
        request = Request(
            request_id="earlier",
            prompt_token_ids=tuple(prompt[:8]),
            sampling=SamplingParams(max_tokens=2),
        )
        pair.engine.submit(request, SequenceMode.LOCAL, sink)
        await sink.wait_until_over("earlier")
        async with handover_of(
            pair, hash_blocks=lambda size: block_hashes(prompt, size)
        ) as handover:
            before = pair.remote.rows()[list(handover.block_ids[:2])].copy()
            await handover.push(BLOCKS, 0, 5)
            assert handover.report.num_bytes == 0
            await handover.push(BLOCKS, 5, 8)
            await handover.commit(7)
        report = handover.report
        assert (report.num_cached_tokens, report.num_tokens) == (8, 5)
        assert report.num_bytes == 5 * TINY_LAYOUT.bytes_per_token
        np.testing.assert_array_equal(pair.remote.rows()[list(handover.block_ids[:2])], before)
        np.testing.assert_array_equal(
            pair.remote.tokens(handover.block_ids, 8, 13), pair.local.tokens(BLOCKS, 8, 13)
        )
        assert pair.receiver.counters.num_committed_tokens == 5


async def hand_over_prompt(
    pair: KvPair, request_id: str, prompt: list[int], may_commit: asyncio.Event
) -> Handover:
    """As a prefill worker, for a sequence that the decode worker waits for."""
    request = Request(
        request_id=request_id,
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(max_tokens=2),
    )
    pair.engine.submit(request, SequenceMode.DECODE, ListSink())
    async with pair.sender.handover(
        request_id,
        decode_address=pair.address,
        num_tokens=len(prompt),
        hash_blocks=lambda size: block_hashes(prompt, size),
    ) as handover:
        await handover.push(BLOCKS, 0, len(prompt))
        await may_commit.wait()
        await handover.commit(7)
    return handover


async def test_a_prefix_that_two_requests_want_at_once_is_sent_once() -> None:
    may_commit = asyncio.Event()
    first_prompt, second_prompt = list(range(13)), [*range(12), 99]
    async with kv_pair() as pair, asyncio.TaskGroup() as tasks:
        first = tasks.create_task(hand_over_prompt(pair, "r", first_prompt, may_commit))
        await until(lambda: pair.receiver.counters.num_live_leases == 1)
        second = tasks.create_task(hand_over_prompt(pair, "s", second_prompt, may_commit))
        await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
        may_commit.set()
        await second
        reports = [first.result().report, second.result().report]
        assert [(r.num_tokens, r.num_cached_tokens) for r in reports] == [(13, 0), (1, 12)]
        assert sum(r.num_bytes for r in reports) == 14 * TINY_LAYOUT.bytes_per_token
        assert pair.sender.counters.num_tokens == {"sent": 14, "held": 12}


async def test_a_prefix_that_does_not_arrive_after_all_is_sent_by_who_waits_for_it() -> None:
    never, at_once = asyncio.Event(), asyncio.Event()
    at_once.set()
    prompt = list(range(13))
    async with kv_pair() as pair:
        first = asyncio.ensure_future(hand_over_prompt(pair, "r", prompt, never))
        await until(lambda: pair.receiver.counters.num_live_leases == 1)
        second = asyncio.ensure_future(hand_over_prompt(pair, "s", prompt, at_once))
        await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
        await cancelled(first)
        assert (await second).report.num_tokens == 13


async def test_a_prefix_that_takes_too_long_is_not_waited_for(monkeypatch) -> None:
    monkeypatch.setattr("kv_transfer.arrivals.PATIENCE_S", 0.05)
    never, at_once = asyncio.Event(), asyncio.Event()
    at_once.set()
    prompt = list(range(13))
    async with kv_pair() as pair:
        first = asyncio.ensure_future(hand_over_prompt(pair, "r", prompt, never))
        await until(lambda: pair.receiver.counters.num_live_leases == 1)
        assert (await hand_over_prompt(pair, "s", prompt, at_once)).report.num_tokens == 13
        await cancelled(first)


async def test_a_full_hit_sends_nothing_and_says_so() -> None:
    at_once = asyncio.Event()
    at_once.set()
    prompt = list(range(12))
    async with kv_pair() as pair:
        await hand_over_prompt(pair, "r", prompt, at_once)
        report = (await hand_over_prompt(pair, "s", prompt, at_once)).report
        assert (report.num_tokens, report.num_bytes, report.num_cached_tokens) == (0, 0, 12)
        assert report.data_plane == "none"
        assert report.transfer_ns == report.write_ns == 0
        assert pair.sender.counters.num_tokens == {"sent": 12, "held": 12}


async def test_a_full_pool_makes_the_sender_wait_in_line() -> None:
    async with kv_pair(num_blocks=4) as pair, asyncio.TaskGroup() as tasks:
        async with handover_of(pair, "first"):
            second = tasks.create_task(complete(pair, "second"))
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
            assert not second.done()
        await second
        assert pair.engine.committed == [("second", 7)]


async def test_waiting_for_blocks_ends_with_the_time_given() -> None:
    async with kv_pair(num_blocks=4, config=replace(FAST, reserve_timeout_s=0.2)) as pair:
        async with handover_of(pair, "first"):
            with pytest.raises(DeadlineError):
                await complete(pair, "second")
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 0)
        assert num_free(pair) == 4


async def test_a_wait_longer_than_the_lease_does_not_lose_it() -> None:
    clock = FakeClock()
    async with kv_pair(num_blocks=4, clock=clock) as pair, asyncio.TaskGroup() as tasks:
        async with handover_of(pair, "first"):
            second = tasks.create_task(complete(pair, "second"))
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
            clock.advance(100)
        assert (await second).report.outcome == "committed"


async def test_what_can_never_fit_is_refused_at_once() -> None:
    async with kv_pair(num_blocks=4) as pair:
        with pytest.raises(CapacityError, match="17 tokens can never fit 4 blocks of 4"):
            await pair.sender.open("r", decode_address=pair.address, num_tokens=17)


async def test_one_request_reserves_once_at_a_time() -> None:
    async with kv_pair(num_blocks=4) as pair, asyncio.TaskGroup() as tasks:
        async with handover_of(pair, "r"):
            with pytest.raises(DuplicateRequestError):
                await complete(pair, "r")
            waiting = tasks.create_task(complete(pair, "other"))
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
            with pytest.raises(DuplicateRequestError):
                await complete(pair, "other")
        await waiting


async def test_an_abort_on_the_decode_side_ends_the_wait_for_blocks() -> None:
    async with kv_pair(num_blocks=4) as pair, asyncio.TaskGroup() as tasks:
        async with handover_of(pair, "first"):
            second = tasks.create_task(refused(UnknownRequestError, complete(pair, "second")))
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
            await abort_on_decode(pair, "second")
            await second
        assert num_free(pair) == 4


async def refused(error: type[Exception], work) -> None:
    with pytest.raises(error):
        await work


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"num_tokens": 0}, InvalidRequestError),
        ({"request_id": ""}, InvalidRequestError),
        ({"lease_ns": 0}, InvalidRequestError),
        ({"block_hashes": [b"x" * 15]}, InvalidRequestError),
        ({"block_hashes": [b"x" * 32] * 4}, InvalidRequestError),
        ({"num_tokens": 0xFFFFFFFF}, CapacityError),
        ({"epoch": 1}, KvLeaseLostError),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_reserve_that_makes_no_sense_is_refused(fields, error) -> None:
    async with kv_pair() as pair, open_channel(pair.address) as channel:
        good = {
            "request_id": "r",
            "num_tokens": 13,
            "lease_ns": 10**9,
            "epoch": pair.receiver.epoch,
        }
        with pytest.raises(aio.AioRpcError) as failure:
            await pb_grpc.KvTransferServiceStub(channel).Reserve(
                pb.ReserveRequest(**(good | fields))
            )
        assert type(error_from_rpc(failure.value)) is error
        assert num_free(pair) == 16


@pytest.mark.parametrize(
    "fields",
    [
        {"lease_id": 0},
        {"lease_id": 1 << 62},
        {"block_ids": [1, 2, 3]},
        {"block_ids": [1, 2, 3, 4, 5]},
        {"block_ids": [1, 2, 3, 3]},
        {"block_ids": [1, 2, 3, 16]},
        {"num_cached_tokens": 14},
        {"lease_ns": 0},
    ],
    ids=str,
)
async def test_a_grant_that_makes_no_sense_is_refused(fields) -> None:
    async with kv_pair() as pair:
        offer = pair.receiver.handshake(
            sender_id="p",
            layout=TINY_LAYOUT,
            model_digest="abc",
            protocol_version=PROTOCOL_VERSION,
        )
        good: dict[str, Any] = {
            "lease_id": 1,
            "block_ids": [1, 2, 3, 4],
            "num_cached_tokens": 0,
            "lease_ns": 1,
        }
        check_grant(pb.ReserveResponse(**good), 13, offer)
        with pytest.raises(LayoutMismatchError):
            check_grant(pb.ReserveResponse(**(good | fields)), 13, offer)


# Push and commit.


async def test_pushes_continue_where_the_last_one_ended() -> None:
    async with kv_pair() as pair, handover_of(pair) as handover:
        await handover.push(BLOCKS, 0, 5)
        with pytest.raises(ValueError, match=r"\[6, 13\) where \[5, 13\) is left"):
            await handover.push(BLOCKS, 6, 7)
        with pytest.raises(ValueError, match=r"\[5, 14\)"):
            await handover.push(BLOCKS, 5, 9)
        with pytest.raises(ValueError, match="commit at token 5 of 13"):
            await handover.commit(1)


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_layers_leave_as_their_step_writes_them(plane: str) -> None:
    async with kv_pair(plane) as pair, handover_of(pair) as handover:
        blocks = list(handover.block_ids)
        sequence = pair.local.tokens(BLOCKS, 0, 13).copy()
        progress = pair.local.progress

        def compute(first: int, end: int, layer: int) -> None:
            for token in range(first, end):
                index, slot = divmod(token, TINY_LAYOUT.block_size_tokens)
                pair.local.blocks()[BLOCKS[index], layer, :, :, slot] = sequence[token, layer]

        def has_arrived(end: int, layer: int) -> bool:
            here = pair.remote.tokens(blocks, 0, end)[:, layer]
            return np.array_equal(here, sequence[:end, layer])

        pair.local.rows()[:] = 0  # what leaves too early is wrong
        progress.begin(3)
        pushing = asyncio.ensure_future(handover.push(BLOCKS, 0, 5, step=4))
        progress.reach(3)  # the step before
        progress.begin(4)
        for layer in range(3):
            compute(0, 5, layer)
            progress.reach(layer + 1)
            await until(partial(has_arrived, 5, layer))
        await pushing
        assert handover.report.num_tokens == 5
        assert 0 < handover.report.write_ns <= handover.report.transfer_ns
        await handover.push(BLOCKS, 0, 5)  # the news that all of it is there
        progress.begin(5)
        pushing = asyncio.ensure_future(handover.push(BLOCKS, 0, 13, step=5))
        await until(lambda: len(progress._listeners) == 1)
        assert handover.report.num_bytes == 5 * TINY_LAYOUT.bytes_per_token
        for layer in range(3):
            compute(5, 13, layer)
        progress.begin(6)  # so the one before is over
        progress.reach(1)
        await pushing
        await handover.commit(7)
        assert handover.report.num_bytes == 13 * TINY_LAYOUT.bytes_per_token
        np.testing.assert_array_equal(pair.remote.tokens(blocks, 0, 13), sequence)


async def test_a_push_that_waits_for_its_step_ends_with_its_handover() -> None:
    async with kv_pair() as pair:
        opened = await pair.sender.open("r", decode_address=pair.address, num_tokens=13)
        pushing = asyncio.ensure_future(opened.push(BLOCKS, 0, 13, step=1))
        await until(lambda: len(pair.local.progress._listeners) == 1)
        await pair.sender.close(opened)
        with pytest.raises(WriteStoppedError):
            await pushing
        assert pair.local.progress._listeners == []
        assert pair.engine.stats.num_free_blocks == pair.engine.stats.num_blocks


async def test_commit_and_release_may_be_repeated() -> None:
    async with kv_pair() as pair, open_channel(pair.address) as channel:
        stub = pb_grpc.KvTransferServiceStub(channel)
        committed = (await complete(pair))._permit
        commit = pb.CommitRequest(
            epoch=committed.epoch,
            lease_id=committed.lease_id,
            num_bytes=13 * TINY_LAYOUT.bytes_per_token,
            first_token_id=7,
        )
        await stub.Commit(commit)
        release = pb.ReleaseRequest(epoch=committed.epoch, lease_id=committed.lease_id)
        assert (await stub.Release(release)).num_freed_blocks == 0
        assert pair.engine.committed == [("r", 7)]

        async with handover_of(pair, "s") as handover:
            release.lease_id = commit.lease_id = handover._permit.lease_id
        assert (await stub.Release(release)).num_freed_blocks == 4
        assert (await stub.Release(release)).num_freed_blocks == 4
        with pytest.raises(aio.AioRpcError, match=r"is over \(released\)"):
            await stub.Commit(commit)
        assert num_free(pair) == 12

        release.lease_id = commit.lease_id = 12345
        assert (await stub.Release(release)).num_freed_blocks == 0
        with pytest.raises(aio.AioRpcError, match="lease 12345 is over"):
            await stub.Commit(commit)


async def test_a_commit_of_too_few_bytes_is_refused_and_frees_the_blocks() -> None:
    async with kv_pair() as pair:
        async with handover_of(pair) as handover:
            await handover.push(BLOCKS, 0, 13)
            handover.report.num_bytes -= 1
            with pytest.raises(InvalidRequestError, match="where 13 tokens are"):
                await handover.commit(7)
        assert pair.engine.committed == []
        assert num_free(pair) == 16
        assert pair.receiver.counters.ended_leases == {"refused": 1}


async def test_a_reservation_that_the_engine_dropped_cannot_be_committed() -> None:
    async with kv_pair() as pair:
        async with handover_of(pair) as handover:
            await handover.push(BLOCKS, 0, 13)
            await pair.engine.abort("r")  # without the fence, as if the engine had started anew
            with pytest.raises(KvLeaseLostError, match="nothing is reserved"):
                await handover.commit(7)
        assert num_free(pair) == 16


async def test_a_dead_engine_is_reported_to_the_sender() -> None:
    async with kv_pair() as pair:
        async with handover_of(pair) as handover:
            await handover.push(BLOCKS, 0, 13)
            pair.engine.crash()
            with pytest.raises(PeerUnavailableError, match="engine thread died"):
                await handover.commit(7)
        assert pair.receiver.counters.num_quarantined_leases == 1


# Damage.


def missent(num_times: int) -> Callable[..., None]:
    """A send that spoils a bit of the payload the first so many times."""
    left = itertools.count(num_times, -1)
    original = stream.send

    def send(sock: Any, header: bytes, *payload: memoryview, **more: Any) -> None:
        sent = bytearray(b"".join(payload))
        if next(left) > 0:
            sent[0] ^= 1
        original(sock, header, memoryview(sent), **more)

    return send


def miscopied(num_times: int) -> Callable[..., None]:
    """A copy that spoils a bit the first so many times."""
    left = itertools.count(num_times, -1)
    whole_copy = BlockCopies.copy

    def copy(copies: BlockCopies, first: int, end: int, **more: Any) -> None:
        whole_copy(copies, first, end, **more)
        if next(left) > 0:
            copies.target[copies.runs(first, end)[0][0]] ^= 1

    return copy


def spoil(monkeypatch, plane: str, num_times: int) -> None:
    if plane == "shm":
        monkeypatch.setattr(BlockCopies, "copy", miscopied(num_times))
    else:
        monkeypatch.setattr(stream, "send", missent(num_times))


CHECKED = replace(FAST, checksums=Checksums.ALWAYS)


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_what_was_damaged_on_its_way_is_sent_again_and_counted(
    plane: str, monkeypatch
) -> None:
    async with kv_pair(plane, config=CHECKED) as pair:
        spoil(monkeypatch, plane, 1)
        handover = await complete(pair)
        np.testing.assert_array_equal(
            pair.remote.tokens(handover.block_ids, 0, 13), pair.local.tokens(BLOCKS, 0, 13)
        )
        assert handover.report.retransfers == ["corrupt"]
        assert handover.report.num_bytes == 13 * TINY_LAYOUT.bytes_per_token
        assert pair.sender.counters.retransfers == {"corrupt": 1}
        assert pair.sender.counters.handovers == {"committed": 1}


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_what_is_damaged_again_is_never_committed(plane: str, monkeypatch) -> None:
    async with kv_pair(plane, config=CHECKED) as pair:
        spoil(monkeypatch, plane, 1000)
        async with handover_of(pair) as handover:
            with pytest.raises(KvCorruptionError):
                await handover.push(BLOCKS, 0, 13)
            with pytest.raises(KvCorruptionError):
                await handover.commit(7)
        assert pair.engine.committed == []
        assert num_free(pair) == 16
        assert pair.sender.counters.retransfers == {"corrupt": 1}


async def test_a_connection_that_was_cut_is_made_again_and_counted() -> None:
    async with kv_pair("tcp") as pair:
        await complete(pair, "r")
        (rank,) = pair.receiver._group.ranks
        assert isinstance(rank, LocalReceivingRank)
        assert rank.tcp is not None
        for connection in list(rank.tcp._listener.connections):
            connection.shutdown()
        await until(lambda: not rank.tcp._listener.connections)
        assert (await complete(pair, "s")).report.retransfers == ["broken"]
        assert pair.sender.counters.retransfers == {"broken": 1}


# Leases.


async def test_a_sender_that_never_comes_back_loses_its_blocks_with_the_lease() -> None:
    clock = FakeClock()
    async with kv_pair(clock=clock) as pair, open_channel(pair.address) as channel:
        request = pb.ReserveRequest(
            request_id="r", num_tokens=13, lease_ns=10**9, epoch=pair.receiver.epoch
        )
        await pb_grpc.KvTransferServiceStub(channel).Reserve(request)
        clock.advance(0.99)
        pair.receiver.sweep()
        assert num_free(pair) == 12
        clock.advance(0.01)
        pair.receiver.sweep()
        await until(lambda: num_free(pair) == 16)
        assert pair.receiver.counters.ended_leases == {"expired": 1}
        assert (await complete(pair, "r")).report.outcome == "committed"


async def test_a_handover_that_is_renewed_outlives_its_lease() -> None:
    clock = FakeClock()
    async with kv_pair(clock=clock) as pair, handover_of(pair) as handover:
        for end_token in range(1, 14):
            clock.advance(0.9)
            await pair.sender.renew_leases()
            pair.receiver.sweep()
            await handover.push(BLOCKS, end_token - 1, 1)
        await handover.commit(7)


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_handover_that_is_not_renewed_writes_no_more(plane: str) -> None:
    clock = FakeClock()
    async with kv_pair(plane, clock=clock, config=replace(FAST, lease_s=1000.0)) as pair:
        async with handover_of(pair) as handover:
            await handover.push(BLOCKS, 0, 5)
            clock.advance(1000)
            before = pair.remote.rows().copy()
            with pytest.raises(KvLeaseLostError):
                await handover.push(BLOCKS, 5, 8)
            with pytest.raises(KvLeaseLostError):
                await handover.commit(7)
        np.testing.assert_array_equal(pair.remote.rows(), before)
        assert num_free(pair) == 16


async def test_renewal_tells_the_sender_what_is_lost() -> None:
    async with kv_pair() as pair, handover_of(pair, "r") as lost, handover_of(pair, "s") as kept:
        assert await pair.receiver.abort("r") == 4
        await pair.sender.renew_leases()
        assert lost._permit.deadline_s == float("-inf")
        await kept.push(BLOCKS, 0, 13)
        await kept.commit(7)


# Restarts and absences.


async def test_a_worker_that_started_again_is_greeted_again() -> None:
    engine = FakeEngine(num_blocks=16, block_size_tokens=4)
    async with AsyncExitStack() as stack:
        pair = await stack.enter_async_context(kv_pair())
        first = await stack.enter_async_context(AsyncExitStack())

        async def start(receiver_id: str, address: str) -> str:
            remote = first.enter_context(HostMemory())
            group = ReceivingGroup.single(remote, FAST)
            receiver = KvReceiver(
                engine, group, receiver_id=receiver_id, model_digest="abc", config=FAST
            )
            await first.enter_async_context(receiver)
            return await first.enter_async_context(serving(receiver, address=address))

        address = await start("old", "127.0.0.1:0")
        async with pair.sender.handover("r", decode_address=address, num_tokens=13) as handover:
            assert handover.receiver_id == "old"
            await handover.push(BLOCKS, 0, 5)
            await first.aclose()
            await start("new", address)
            await handover.push(BLOCKS, 5, 8)  # harmless: memory that only this end holds
            with pytest.raises((KvLeaseLostError, PeerUnavailableError)):
                await handover.commit(7)
        assert engine.committed == []
        await engine.abort("r")
        async with pair.sender.handover("s", decode_address=address, num_tokens=13) as again:
            assert again.receiver_id == "new"
            assert again.report.num_handshakes == 1
            await again.push(BLOCKS, 0, 13)
            await again.commit(7)


async def test_an_epoch_that_is_over_is_refused_everywhere() -> None:
    async with kv_pair() as pair, open_channel(pair.address) as channel:
        stub = pb_grpc.KvTransferServiceStub(channel)
        calls = [
            stub.Reserve(pb.ReserveRequest(request_id="r", num_tokens=1, epoch=1, lease_ns=1)),
            stub.Renew(pb.RenewRequest(epoch=1, lease_ns=1)),
            stub.Commit(pb.CommitRequest(epoch=1, lease_id=1)),
        ]
        for call in calls:
            with pytest.raises(aio.AioRpcError, match="has started again since") as failure:
                await call
            assert failure.value.code() is StatusCode.ABORTED
        released = await stub.Release(pb.ReleaseRequest(epoch=1, lease_id=1))
        assert released.num_freed_blocks == 0


async def test_a_worker_that_is_not_there_is_unavailable_and_forgotten() -> None:
    async with kv_pair() as pair:
        with pytest.raises(PeerUnavailableError):
            await pair.sender.open("r", decode_address="127.0.0.1:1", num_tokens=13)
        assert list(pair.sender._peers) == []


# Aborts.


class GatedEngine(FakeEngine):
    """Its commit waits until it is let go."""

    def __init__(self) -> None:
        super().__init__(num_blocks=16, block_size_tokens=4)
        self.is_committing = asyncio.Event()
        self.may_commit = asyncio.Event()

    async def commit(self, request_id: str, first_token_id: int) -> None:
        self.is_committing.set()
        await self.may_commit.wait()
        await super().commit(request_id, first_token_id)


async def cancelled(task: "asyncio.Task[object]") -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_an_abort_while_waiting_for_blocks(plane: str) -> None:
    async with kv_pair(plane, num_blocks=4) as pair:
        async with handover_of(pair, "first"):
            waiting = asyncio.ensure_future(complete(pair, "second"))
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 1)
            await cancelled(waiting)
            await until(lambda: pair.receiver.counters.num_waiting_reserves == 0)
        assert num_free(pair) == 4
        assert pair.sender.counters.handovers == {"released": 2}


async def test_an_abort_in_the_moment_of_the_grant(monkeypatch) -> None:
    original = Peer.__init__

    def init(self: Peer, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        reserve = self.calls.Reserve

        def cancelled_by_its_answer(request: pb.ReserveRequest, *, timeout: float) -> Any:
            call = reserve(request, timeout=timeout)
            task = asyncio.current_task()
            assert task is not None
            call.add_done_callback(lambda _: task.cancel())
            return call

        monkeypatch.setattr(self.calls, "Reserve", cancelled_by_its_answer)

    monkeypatch.setattr(Peer, "__init__", init)
    async with kv_pair() as pair:
        task = asyncio.ensure_future(complete(pair))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pair.receiver.counters.ended_leases == {"released": 1}
        assert num_free(pair) == 16


@pytest.mark.parametrize("plane", ["shm", "tcp"])
@pytest.mark.parametrize("num_pushed", [0, 5, 13])
async def test_an_abort_between_pushes(plane: str, num_pushed: int) -> None:
    async with kv_pair(plane) as pair:
        is_there = asyncio.Event()

        async def linger() -> None:
            async with handover_of(pair) as handover:
                if num_pushed:
                    await handover.push(BLOCKS, 0, num_pushed)
                is_there.set()
                await asyncio.Event().wait()

        task = asyncio.ensure_future(linger())
        await is_there.wait()
        await cancelled(task)
        assert num_free(pair) == 16
        assert pair.receiver.counters.ended_leases == {"released": 1}


async def test_an_abort_in_the_middle_of_a_push_waits_for_the_writer(monkeypatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    whole_copy = BlockCopies.copy

    def stuck_copy(*copies: Any, **more: Any) -> None:
        entered.set()
        assert go_on.wait(10)
        whole_copy(*copies, **more)

    monkeypatch.setattr(local_sending_rank, "QUICK_BYTES", 0)  # stuck in a thread
    async with kv_pair("shm") as pair:
        monkeypatch.setattr(BlockCopies, "copy", stuck_copy)
        task = asyncio.ensure_future(complete(pair))
        await until(entered.is_set)
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
        assert not task.done()  # a slice is being written: nothing is given back yet
        assert pair.receiver.counters.num_live_leases == 1
        assert num_free(pair) == 12
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert num_free(pair) == 16
        assert pair.sender.counters.handovers == {"released": 1}


async def test_an_abort_during_commit_leaves_the_sequence_to_the_decode_side() -> None:
    engine = GatedEngine()
    async with kv_pair(engine=engine) as pair:
        task = asyncio.ensure_future(complete(pair))
        await engine.is_committing.wait()
        task.cancel()
        await asyncio.wait([task], timeout=0.05)
        engine.may_commit.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.committed == [("r", 7)]
        assert pair.receiver.counters.ended_leases == {"committed": 1}
        assert await abort_on_decode(pair, "r") == 4
        assert num_free(pair) == 16


async def test_an_abort_on_both_sides_at_once_frees_the_blocks_once() -> None:
    async with kv_pair() as pair, open_channel(pair.address) as channel:
        stub = pb_grpc.KvTransferServiceStub(channel)
        handover = await pair.sender.open("r", decode_address=pair.address, num_tokens=13)
        permit = handover._permit
        release = pb.ReleaseRequest(epoch=permit.epoch, lease_id=permit.lease_id)
        async with asyncio.TaskGroup() as tasks:
            aborted = tasks.create_task(abort_on_decode(pair, "r"))
            closed = tasks.create_task(pair.sender.close(handover))
            released = [tasks.create_task(release_of(stub, release)) for _ in range(3)]
        assert num_free(pair) == 16
        assert aborted.result() in (0, 4)
        assert closed.result() is None
        assert {task.result() for task in released} == {4}


async def release_of(stub: pb_grpc.KvTransferServiceStub, request: pb.ReleaseRequest) -> int:
    return int((await stub.Release(request)).num_freed_blocks)


async def test_closing_a_sender_gives_back_what_is_open() -> None:
    async with kv_pair() as pair:
        group = SendingGroup.single(pair.local, FAST)
        other = KvSender(
            group, sender_id="p", model_digest="abc", open_channel=open_channel, config=FAST
        )
        async with other:
            await other.open("r", decode_address=pair.address, num_tokens=13)
            assert num_free(pair) == 12
        assert num_free(pair) == 16


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_nothing_is_left_open(plane: str) -> None:
    async with kv_pair(plane) as pair:  # gRPC keeps its own threads after the first use
        await complete(pair)
    before = ours(open_things())
    async with kv_pair(plane) as pair:
        await complete(pair)
        unfinished = await pair.sender.open("s", decode_address=pair.address, num_tokens=13)
        await unfinished.push(BLOCKS, 0, 13)
        assert ours(open_things()) - before
    await until(lambda: ours(open_things()) <= before)


def ours(things: Counter[str]) -> Counter[str]:
    return Counter({name: n for name, n in things.items() if "memfd:" in name or " kv-" in name})
