"""Ranks in processes of their own: bytes go from pool to pool, and a dead rank is named."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from engine.errors import (
    InvalidRequestError,
    KvLeaseLostError,
    PeerUnavailableError,
    RankDeadError,
)
from engine.kv_cache.layout import KvLayout
from kv_transfer.config import TransferConfig
from kv_transfer.handover import Handover, TokenShard
from kv_transfer.offer import RankOffer, TcpOffer
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.rank import convert
from kv_transfer.rank.remote import RemoteRank
from kv_transfer.rank.servicer import SERVICE_NAME, KvRankServicer, serving_rank
from kv_transfer.reshard import num_handover_bytes
from kv_transfer.sending_rank import Target
from kv_transfer.slot_ranges import SlotRange
from mesh.channel import open_channel
from mesh.server import listening
from mesh.status import error_from_rpc
from protos.isthmus.v1 import kv_rank_pb2 as pb
from protos.isthmus.v1 import kv_rank_pb2_grpc as pb_grpc
from tests.fakes.clock import FakeClock
from tests.fakes.kv_groups import NUM_BLOCKS, KvGroups, kv_groups
from tests.fakes.kv_memory import TINY_LAYOUT, WHOLE, HostMemory
from tests.fakes.kv_pair import FAST
from tests.fakes.kv_rank_process import arguments_of
from tests.service.test_kv_transfer_groups import NUM_TOKENS, a_sequence, layouts_of
from tests.service.test_kv_transfer_handover import until

BLOCKS = [9, 2, 7, 4, 0, 11]
Process = subprocess.Popen[str]


class Processes:
    """Starts ranks, by worker id and rank; ends what is left of them."""

    def __init__(self, plane: str) -> None:
        self.of: dict[tuple[str, int], Process] = {}
        self.timeout_s = 5.0
        """Of a rank's calls."""
        self._plane = plane

    async def open(
        self, worker_id: str, rank: int, layout: KvLayout
    ) -> tuple[HostMemory, RemoteRank]:
        command = [sys.executable, "-m", "tests.fakes.kv_rank_process"]
        process = self.of[worker_id, rank] = subprocess.Popen(  # noqa: ASYNC220 - does not wait
            [*command, *arguments_of(NUM_BLOCKS, self._plane, layout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        port, fd = (await asyncio.to_thread(process.stdout.readline)).split()
        address = f"127.0.0.1:{port}"
        remote = RemoteRank(
            rank, address, open_channel(address), worker_id=worker_id, timeout_s=self.timeout_s
        )
        memory = HostMemory(NUM_BLOCKS, layout, path=f"/proc/{process.pid}/fd/{fd}")
        return memory, remote

    def kill(self, worker_id: str, rank: int) -> None:
        self.of[worker_id, rank].kill()
        self.of[worker_id, rank].wait(10)

    def close(self) -> None:
        for process in self.of.values():
            process.kill()
            process.communicate()


@pytest.fixture
def processes(request: pytest.FixtureRequest) -> Iterator[Processes]:
    started = Processes(getattr(request, "param", "shm"))
    yield started
    started.close()


def opened(groups: KvGroups) -> Any:
    return groups.sender.handover("r", decode_address=groups.address, num_tokens=NUM_TOKENS)


async def pushed(groups: KvGroups) -> Handover:
    """A handover that has pushed a part; the caller closes it."""
    handover = await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)
    await handover.push(BLOCKS, 0, 9)
    return handover


@pytest.mark.parametrize("processes", ["shm", "tcp"], indirect=True)
async def test_processes_hand_over_from_pool_to_pool(
    processes: Processes, request: pytest.FixtureRequest
) -> None:
    plane = request.node.callspec.params["processes"]
    layouts = layouts_of("uneven", "tp2", "tp3" if plane == "shm" else "tp2pp2")
    async with kv_groups(*layouts, plane=plane, follower=processes.open) as groups:
        sequence = a_sequence(layouts[0].full)
        groups.hold(sequence, BLOCKS, [TokenShard(0, NUM_TOKENS, 0)])
        async with opened(groups) as handover:
            await handover.push(BLOCKS, 0, 9)
            await handover.push(BLOCKS, 9, 12)
            await handover.commit(5)
        assert handover.report.num_bytes == num_handover_bytes(layouts[1], NUM_TOKENS)
        assert handover.report.data_plane == plane
        for rank, box in enumerate(layouts[1].boxes):
            np.testing.assert_array_equal(
                groups.arrived(rank, handover.block_ids, NUM_TOKENS),
                sequence[:, box.layers][:, :, :, box.kv_heads],
            )


async def test_a_sending_rank_killed_in_a_push_is_named_and_the_blocks_come_back(
    processes: Processes,
) -> None:
    async with kv_groups(*layouts_of("gqa", "tp2", "1"), follower=processes.open) as groups:
        total = groups.engine.stats.num_free_blocks
        handover = await pushed(groups)
        processes.of["prefill-0", 1].send_signal(signal.SIGSTOP)
        push = asyncio.ensure_future(handover.push(BLOCKS, 9, 12))
        await asyncio.wait([push], timeout=0.05)
        assert not push.done()
        processes.kill("prefill-0", 1)
        with pytest.raises(RankDeadError, match=r"rank 1 of prefill-0 \(127\.0\.0\.1:.* is gone"):
            await push
        await groups.sender.close(handover)
        assert groups.engine.stats.num_free_blocks == total
        assert groups.engine.committed == []
        with pytest.raises(RankDeadError, match="rank 1 of prefill-0"):
            await pushed(groups)


async def test_a_receiving_rank_killed_before_the_commit_is_named(processes: Processes) -> None:
    async with kv_groups(*layouts_of("gqa", "1", "tp3"), follower=processes.open) as groups:
        handover = await pushed(groups)
        await handover.push(BLOCKS, 9, 12)
        processes.kill("decode-0", 2)
        with pytest.raises(
            PeerUnavailableError, match=r"rank 2 of decode-0 \(127\.0\.0\.1:.* is gone"
        ):
            await handover.commit(1)
        await groups.sender.close(handover)
        assert groups.engine.committed == []
        assert groups.receiver.counters.num_live_leases == 0
        with pytest.raises(PeerUnavailableError):  # or that its memory file is gone
            await groups.sender.open("s", decode_address=groups.address, num_tokens=NUM_TOKENS)


async def test_a_rank_that_is_stopped_keeps_the_blocks_in_quarantine_until_it_goes_on(
    processes: Processes,
) -> None:
    async with kv_groups(*layouts_of("gqa", "1", "tp3"), follower=processes.open) as groups:
        total = groups.engine.stats.num_free_blocks
        handover = await pushed(groups)
        process = processes.of["decode-0", 1]
        process.send_signal(signal.SIGSTOP)
        aborting = asyncio.ensure_future(groups.receiver.abort("r"))
        await asyncio.wait([aborting], timeout=0.05)
        assert not aborting.done()
        assert groups.receiver.counters.num_quarantined_leases == 1
        assert groups.engine.stats.num_free_blocks < total
        with pytest.raises(KvLeaseLostError):  # rank 0 is fenced, and its block is not shared
            await handover.push(BLOCKS, 9, 12)
        process.send_signal(signal.SIGCONT)
        assert await aborting == len(handover.block_ids)
        assert groups.engine.stats.num_free_blocks == total
        await groups.sender.close(handover)


async def test_a_sending_rank_that_is_stopped_holds_up_the_end_no_longer_than_a_call(
    processes: Processes,
) -> None:
    processes.timeout_s = 0.5
    async with kv_groups(*layouts_of("gqa", "tp2", "1"), follower=processes.open) as groups:
        total = groups.engine.stats.num_free_blocks
        handover = await pushed(groups)
        processes.of["prefill-0", 1].send_signal(signal.SIGSTOP)
        push = asyncio.ensure_future(handover.push(BLOCKS, 9, 12))
        await until(lambda: len(handover._writes) == 1)  # rank 0 has written its part
        await groups.sender.close(handover)
        with pytest.raises(RankDeadError, match=r"rank 1 of prefill-0 .* does not answer"):
            await push
        await until(lambda: groups.engine.stats.num_free_blocks == total)


# The service alone, in this process.


@asynccontextmanager
async def a_rank(
    config: TransferConfig = FAST,
) -> AsyncIterator[tuple[KvRankServicer, RemoteRank, Any]]:
    """A served rank with TINY_LAYOUT: its servicer, rank 0's handle, and a bare stub."""
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(HostMemory())
        servicer = KvRankServicer(memory, config)
        stack.push_async_callback(servicer.close)

        def add(server: aio.Server) -> None:
            pb_grpc.add_KvRankServiceServicer_to_server(servicer, server)

        port = await stack.enter_async_context(
            listening(add, address="127.0.0.1:0", drain_grace_s=0)
        )
        address = f"127.0.0.1:{port}"
        channel = open_channel(address)
        remote = RemoteRank(1, address, channel, worker_id="prefill-0", timeout_s=2.0)
        await stack.enter_async_context(remote)
        yield servicer, remote, pb_grpc.KvRankServiceStub(channel)


class Cable:
    """Carries the connections to a server, until they are cut."""

    def __init__(self, to: tuple[str, int]) -> None:
        self._to = to
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[str]:
        """Yields the address of this end."""
        server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            yield f"{host}:{port}"
        finally:
            server.close()
            self.cut()
            await asyncio.gather(*self._tasks)

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._to)
        self._writers += [writer, far_writer]
        for source, target in ((reader, far_writer), (far_reader, writer)):
            self._tasks.add(asyncio.ensure_future(self._copy(source, target)))

    @staticmethod
    async def _copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                target.write(data)
        except OSError:
            pass
        target.close()


async def test_a_connection_that_is_cut_costs_nothing(deaf_receiver: Target) -> None:
    async with a_rank() as (servicer, direct, _):
        host, port = direct.address.split(":")
        cable = Cable((host, int(port)))
        async with (
            cable.laid() as address,
            RemoteRank(
                1, address, open_channel(address), worker_id="prefill-0", timeout_s=2.0
            ) as remote,
        ):
            assert await remote.start(7) == await direct.start(7)
            cable.cut()
            assert await remote.start(7) == await direct.start(7)
            link = await remote.open_link([deaf_receiver])
            permit, _ = a_permit()
            writing = link.write(permit, PARTS)
            await until(lambda: bool(servicer._permits))
            first = set(servicer._permits)
            cable.cut()
            await until(lambda: bool(servicer._permits) and set(servicer._permits) != first)
            permit.stop()
            with pytest.raises(KvLeaseLostError, match="given up"):
                await writing


async def test_a_rank_that_cannot_be_reached_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
    rank = RemoteRank(1, address, open_channel(address), worker_id="decode-0", timeout_s=0.2)
    with pytest.raises(RankDeadError, match=rf"rank 1 of decode-0 \({address}\) cannot be reached"):
        async with rank:
            pass


@pytest.fixture
def deaf_receiver() -> Iterator[Target]:
    """Takes connections and reads nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        offer = RankOffer(None, TcpOffer(*listener.getsockname()))
        yield Target("decode-0", offer, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)


def a_permit(lease_s: float = 100.0) -> tuple[WritePermit, FakeClock]:
    clock = FakeClock()
    return WritePermit(5, 77, clock, clock() + lease_s), clock


PARTS = [SlotRange(3, 0, 4, 0, 4)]


async def test_a_permit_that_moves_moves_in_the_other_process(deaf_receiver: Target) -> None:
    async with a_rank() as (servicer, remote, _):
        link = await remote.open_link([deaf_receiver])
        assert link.data_planes == ["tcp"]
        permit, clock = a_permit()
        writing = link.write(permit, PARTS)
        await until(lambda: bool(servicer._permits))
        (other,) = servicer._permits.values()
        first_deadline_s = other.deadline_s
        permit.move(clock() + 1000)
        await until(lambda: other.deadline_s > first_deadline_s + 800)
        permit.move(float("-inf"))
        with pytest.raises(KvLeaseLostError):
            await writing
        assert not servicer._permits
        assert not permit.on_change


async def test_a_write_that_is_stopped_stops_in_the_other_process(deaf_receiver: Target) -> None:
    async with a_rank() as (servicer, remote, _):
        link = await remote.open_link([deaf_receiver])
        permit, _ = a_permit()
        writing = link.write(permit, PARTS)
        await until(lambda: bool(servicer._permits))
        permit.stop()
        with pytest.raises(KvLeaseLostError, match="given up"):
            await writing
        link.close()
        await until(lambda: not servicer._links)


async def test_a_write_that_waits_for_its_step_stops_in_the_other_process(
    deaf_receiver: Target,
) -> None:
    async with a_rank() as (servicer, remote, _):
        link = await remote.open_link([deaf_receiver])
        permit, _ = a_permit()
        progress = servicer._memory.progress
        writing = link.write(permit, PARTS, 1)
        await until(lambda: len(progress._listeners) == 1)
        permit.stop()
        with pytest.raises(KvLeaseLostError, match="given up"):
            await writing
        assert progress._listeners == []
        assert not servicer._permits


async def test_a_receiver_that_is_gone_is_not_taken_for_a_dead_rank(deaf_receiver: Target) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nowhere = RankOffer(None, TcpOffer(*listener.getsockname()))
    async with a_rank() as (_, remote, _):
        target = Target("decode-0", nowhere, TINY_LAYOUT, 16, "127.0.0.1:1", WHOLE)
        link = await remote.open_link([target])
        with pytest.raises(PeerUnavailableError, match="data port"):
            await link.write(a_permit()[0], PARTS)


async def test_a_rank_says_what_it_serves_and_that_it_does() -> None:
    def look(port: int) -> None:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            reflected = ProtoReflectionDescriptorDatabase(channel)
            assert SERVICE_NAME in reflected.get_services()
            assert DescriptorPool(reflected).FindServiceByName(SERVICE_NAME).methods
            health = health_pb2_grpc.HealthStub(channel)
            for name in ("", SERVICE_NAME):
                answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
                assert answer.status == health_pb2.HealthCheckResponse.SERVING

    with HostMemory(NUM_BLOCKS) as memory:
        async with serving_rank(memory, FAST) as port:
            await asyncio.to_thread(look, port)


async def test_a_rank_serves_one_epoch() -> None:
    async with a_rank() as (_, remote, _):
        offer = await remote.start(7)
        assert offer.shm is not None
        assert offer.tcp is not None
        assert await remote.start(7) == offer
        with pytest.raises(InvalidRequestError, match="serves epoch 7, not 8"):
            await remote.start(8)


async def test_a_rank_that_listens_everywhere_is_found_at_its_own_host_not_at_rank_0s() -> None:
    async with a_rank(replace(FAST, data_address="0.0.0.0:0")) as (_, remote, _):
        offer = await remote.start(7)
        assert offer.tcp is not None
        assert offer.tcp.host == "127.0.0.1"


async def test_a_window_that_comes_after_its_fence_stays_shut() -> None:
    async with a_rank() as (servicer, remote, _):
        await remote.start(7)
        await remote.fence(5)
        await remote.open(WriteWindow(5, (1, 2), 0, 8))
        assert servicer._receiving.tcp is not None
        assert not servicer._receiving.tcp.gate._open
        await remote.forget([5])


async def test_a_rank_says_with_a_lease_s_end_which_connections_it_dropped() -> None:
    async with a_rank() as (servicer, remote, _):
        offer = await remote.start(7)
        assert offer.tcp is not None
        _, stranger = await asyncio.open_connection(offer.tcp.host, offer.tcp.port)
        stranger.write(bytes(1000))
        await until(lambda: bool(servicer._receiving.dropped))
        assert remote.dropped == {}
        await remote.fence(5)
        await remote.fence(6)
        assert remote.dropped == {"bad_magic": 1}
        stranger.transport.abort()


def a_target(**changes: Any) -> pb.KvTarget:
    target = Target("decode-0", RankOffer(None, None), TINY_LAYOUT, 16, "h:1", WHOLE)
    message = convert.target_to_pb(target)
    for name, value in changes.items():
        (box,) = message.boxes
        setattr(box if hasattr(box, name) else message.layout, name, value)
    return message


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("OpenWindow", pb.OpenWindowRequest(lease_id=0, block_ids=[1], end_token=4)),
        ("OpenWindow", pb.OpenWindowRequest(lease_id=1 << 62, block_ids=[1], end_token=4)),
        ("OpenWindow", pb.OpenWindowRequest(lease_id=5, block_ids=[16], end_token=4)),
        ("OpenWindow", pb.OpenWindowRequest(lease_id=5, block_ids=[1, 1], end_token=4)),
        ("OpenWindow", pb.OpenWindowRequest(lease_id=5, block_ids=[1], end_token=5)),
        ("OpenWindow", pb.OpenWindowRequest(lease_id=5, first_token=3, end_token=2)),
        ("Fence", pb.FenceRequest(lease_id=0)),
        ("Forget", pb.ForgetRequest(lease_ids=[(1 << 64) - 1])),
        ("OpenLink", pb.OpenLinkRequest()),
        ("OpenLink", pb.OpenLinkRequest(targets=[a_target(head_dim=16)])),
        ("OpenLink", pb.OpenLinkRequest(targets=[a_target(num_layers=4)])),
        ("OpenLink", pb.OpenLinkRequest(targets=[a_target(source_layer=1)])),
        ("OpenLink", pb.OpenLinkRequest(targets=[a_target(target_head=1)])),
        ("OpenLink", pb.OpenLinkRequest(targets=[a_target(num_heads=0)])),
        ("Write", pb.WriteRequest(link_id=9, write_id=1, lease_id=5)),
    ],
)
async def test_a_request_that_makes_no_sense_is_refused(method: str, request_: Any) -> None:
    async with a_rank() as (_, _, stub):
        with pytest.raises(aio.AioRpcError) as failure:
            await getattr(stub, method)(request_)
        assert type(error_from_rpc(failure.value)) is InvalidRequestError


@pytest.mark.parametrize(
    "part",
    [
        SlotRange(16, 0, 0, 0, 1),
        SlotRange(0, 0, 16, 0, 1),
        SlotRange(0, 1, 0, 0, 4),
        SlotRange(0, 0, 0, 1, 4),
        SlotRange(0, 0, 0, 0, 0),
        SlotRange(0, (1 << 32) - 1, 0, 0, 1),
    ],
)
async def test_slots_outside_a_pool_are_refused(part: SlotRange, deaf_receiver: Target) -> None:
    async with a_rank() as (servicer, remote, _):
        link = await remote.open_link([deaf_receiver])
        with pytest.raises(InvalidRequestError, match="no such slots"):
            await link.write(a_permit()[0], [*PARTS, part])
        assert not servicer._permits
