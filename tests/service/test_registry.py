import asyncio
import socket
from collections.abc import Callable

import pytest
from redis.asyncio import Redis

from engine.errors import PeerUnavailableError
from mesh.registry import (
    WorkerDirectory,
    connect_redis,
    registered,
    url_without_password,
    worker_ids_key,
    worker_key,
)
from protos.isthmus.v1 import registry_pb2 as pb
from tests.fixtures.redis_server import RedisServer

DECODE = pb.WORKER_ROLE_DECODE
PREFILL = pb.WORKER_ROLE_PREFILL


def record(
    worker_id: str = "d0", *, num_running: int = 0, draining: bool = False
) -> pb.WorkerRecord:
    return pb.WorkerRecord(
        worker_id=worker_id,
        role=DECODE,
        epoch=1,
        address="127.0.0.1:1",
        load=pb.WorkerLoad(num_running=num_running),
        draining=draining,
    )


class Changes:
    """Lets a test wait until a directory's view satisfies a condition."""

    def __init__(self, directory: WorkerDirectory) -> None:
        self._event = asyncio.Event()
        directory.on_change(self._event.set)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self._event.clear()
                await self._event.wait()


def ids(directory: WorkerDirectory) -> list[str]:
    return [worker.worker_id for worker in directory.workers(DECODE)]


async def test_a_worker_is_seen_at_once_and_gone_at_once(redis: Redis) -> None:
    # A poll interval beyond the time limit: only the published message can be that prompt.
    async with WorkerDirectory(redis, roles=[DECODE], poll_s=60) as directory:
        changes = Changes(directory)
        while not (await redis.pubsub_numsub("isthmus:v1:workers"))[0][1]:
            pass
        async with registered(redis, record):
            await changes.until(lambda: ids(directory) == ["d0"])
        await changes.until(lambda: ids(directory) == [])
        assert not directory.is_stale


async def test_every_key_expires(redis: Redis) -> None:
    async with registered(redis, record, ttl_s=3):
        keys = [key async for key in redis.scan_iter()]
        assert len(keys) == 2
        for key in keys:
            assert 0 < await redis.pttl(key) <= 30_000


async def test_a_record_outlives_its_ttl_and_carries_the_current_load(redis: Redis) -> None:
    beats = 0

    def source() -> pb.WorkerRecord:
        nonlocal beats
        beats += 1
        return record(num_running=beats)

    async with (
        registered(redis, source, ttl_s=0.15),
        WorkerDirectory(redis, roles=[DECODE], poll_s=0.02) as directory,
    ):
        async with asyncio.timeout(10):
            while not (found := directory.workers(DECODE)) or found[0].load.num_running < 8:
                await redis.ping()
        assert await redis.exists(worker_key(DECODE, "d0"))
    assert not await redis.exists(worker_key(DECODE, "d0"))


async def test_a_dead_worker_expires(redis: Redis) -> None:
    await redis.set(worker_key(DECODE, "d0"), record().SerializeToString(), px=150)
    await redis.sadd(worker_ids_key(DECODE), "d0")
    async with WorkerDirectory(redis, roles=[DECODE], poll_s=0.02) as directory:
        changes = Changes(directory)
        assert ids(directory) == ["d0"]
        await changes.until(lambda: ids(directory) == [])
    assert not await redis.exists(worker_ids_key(DECODE))


async def test_draining_is_told_at_once(redis: Redis) -> None:
    is_draining = False
    async with (
        registered(redis, lambda: record(draining=is_draining), ttl_s=60) as registration,
        WorkerDirectory(redis, roles=[DECODE], poll_s=0.05) as directory,
    ):
        changes = Changes(directory)
        is_draining = True
        registration.refresh()
        await changes.until(lambda: directory.workers(DECODE)[0].draining)


async def test_wait_for_returns_once_enough_workers_are_there(redis: Redis) -> None:
    async with WorkerDirectory(redis, roles=[DECODE, PREFILL], poll_s=0.02) as directory:
        waiting = asyncio.create_task(directory.wait_for(DECODE, 2))
        async with registered(redis, lambda: record("d0")), registered(redis, lambda: record("d1")):
            found = await asyncio.wait_for(waiting, timeout=10)
    assert [worker.worker_id for worker in found] == ["d0", "d1"]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\xff\xff\xff", id="not-protobuf"),
        pytest.param(b"", id="empty"),
        pytest.param(record("other").SerializeToString(), id="another-id"),
        pytest.param(
            pb.WorkerRecord(worker_id="bad", role=PREFILL, address="a:1").SerializeToString(),
            id="another-role",
        ),
        pytest.param(
            pb.WorkerRecord(
                worker_id="bad", role=DECODE, address="x" * 100_000
            ).SerializeToString(),
            id="too-large",
        ),
    ],
)
async def test_a_bad_record_is_counted_and_the_others_are_seen(redis: Redis, value: bytes) -> None:
    await redis.set(worker_key(DECODE, "bad"), value)
    await redis.sadd(worker_ids_key(DECODE), "bad", b"\xff\xfe")
    async with registered(redis, record), WorkerDirectory(redis, roles=[DECODE]) as directory:
        assert ids(directory) == ["d0"]
        assert directory.num_bad_records == 1


async def test_the_last_view_stays_while_redis_is_gone_and_is_fresh_after(
    own_redis: RedisServer,
) -> None:
    async with (
        connect_redis(own_redis.url) as redis,
        registered(redis, lambda: record("d0"), ttl_s=0.6) as registration,
        WorkerDirectory(redis, roles=[DECODE], poll_s=0.02, settle_s=10) as directory,
    ):
        changes = Changes(directory)
        assert ids(directory) == ["d0"]
        assert not directory.is_stale

        own_redis.kill()
        await changes.until(lambda: directory.is_stale)
        assert ids(directory) == ["d0"]

        views: list[list[str]] = []
        directory.on_change(lambda: views.append(ids(directory)))
        await asyncio.to_thread(own_redis.start)  # its memory is empty now
        await changes.until(lambda: not directory.is_stale)
        assert ids(directory) == ["d0"]
        assert [] not in views
        assert registration.is_registered


async def test_who_does_not_come_back_after_an_outage_is_dropped_in_the_end(
    own_redis: RedisServer,
) -> None:
    async with (
        connect_redis(own_redis.url) as redis,
        WorkerDirectory(redis, roles=[DECODE], poll_s=0.02, settle_s=0.2) as directory,
    ):
        changes = Changes(directory)
        await redis.set(worker_key(DECODE, "d0"), record().SerializeToString())
        await redis.sadd(worker_ids_key(DECODE), "d0")
        await changes.until(lambda: ids(directory) == ["d0"])
        own_redis.kill()
        await changes.until(lambda: directory.is_stale)
        await asyncio.to_thread(own_redis.start)
        await changes.until(lambda: not directory.is_stale)
        assert ids(directory) == []


async def test_leaving_the_block_is_quick_with_redis_gone(own_redis: RedisServer) -> None:
    async with connect_redis(own_redis.url) as redis:
        async with asyncio.timeout(5):
            async with registered(redis, record), WorkerDirectory(redis, roles=[DECODE]):
                own_redis.kill()


async def test_a_body_that_fails_leaves_the_registry(redis: Redis) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with registered(redis, record):
            raise ValueError("body")
    assert caught.group_contains(ValueError, match="body")
    assert not await redis.exists(worker_key(DECODE, "d0"))


@pytest.mark.parametrize("url", ["http://localhost", "localhost:6379", "redis://h:port"])
async def test_a_url_that_cannot_be_read_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=url):
        async with connect_redis(url):
            pytest.fail("connected")


async def test_nothing_at_the_url_is_named_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        url = f"redis://user:secret@127.0.0.1:{bound.getsockname()[1]}/0"
        with pytest.raises(PeerUnavailableError, match=r"user:\*\*\*@127.0.0.1") as caught:
            async with asyncio.timeout(5), connect_redis(url):
                pytest.fail("connected")
    assert "secret" not in str(caught.value)


async def test_a_server_that_is_not_redis_is_named() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        with pytest.raises(
            PeerUnavailableError, match=f"no usable Redis at redis://127.0.0.1:{port}"
        ):
            async with asyncio.timeout(5), connect_redis(f"redis://127.0.0.1:{port}"):
                pytest.fail("connected")


async def test_a_server_that_says_nothing_is_given_up() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(PeerUnavailableError, match="no usable Redis"):
            async with (
                asyncio.timeout(10),
                connect_redis(f"redis://127.0.0.1:{silent.getsockname()[1]}"),
            ):
                pytest.fail("connected")


async def test_a_wrong_password_is_said(own_redis: RedisServer) -> None:
    own_redis.kill()
    own_redis.start("--requirepass", "right")
    for url in (own_redis.url, own_redis.url.replace("unix://", "unix://:wrong@")):
        with pytest.raises(PeerUnavailableError, match=r"(?i)auth|password") as caught:
            async with connect_redis(url):
                pytest.fail("connected")
        assert "wrong" not in str(caught.value)


def test_urls_are_shown_without_their_password() -> None:
    assert url_without_password("redis://:pw@h:1/0") == "redis://:***@h:1/0"
    assert url_without_password("redis://h:1/0") == "redis://h:1/0"
