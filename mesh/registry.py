"""Workers announce themselves in Redis under keys that expire; others read who is there.

Redis is a hint: without it a worker goes on working and a directory keeps its last view.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from google.protobuf.message import DecodeError
from redis import exceptions as redis_errors
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from engine.errors import PeerUnavailableError
from protos.isthmus.v1.registry_pb2 import WorkerRecord, WorkerRole

logger = logging.getLogger(__name__)

CHANGES_CHANNEL = "isthmus:v1:workers"
"""Published to when a worker comes, goes or drains, so that directories look at once."""
REDIS_TIMEOUT_S = 2.0
DEFAULT_TTL_S = 3.0
MAX_RECORD_BYTES = 64 * 1024
# A lost connection, a refused one and a time-out; OSError covers what redis-py does not wrap.
UNREACHABLE = (redis_errors.RedisError, OSError, TimeoutError)


def role_name(role: WorkerRole) -> str:
    """prefill, decode, gateway or store."""
    return WorkerRole.Name(role).removeprefix("WORKER_ROLE_").lower()


def worker_key(role: WorkerRole, worker_id: str) -> str:
    """Holds a WorkerRecord."""
    return f"isthmus:v1:worker:{role_name(role)}:{worker_id}"


def worker_ids_key(role: WorkerRole) -> str:
    """Set of the ids that have, or until lately had, a record."""
    return f"isthmus:v1:worker_ids:{role_name(role)}"


def url_without_password(url: str) -> str:
    """For logs and errors."""
    parts = urlsplit(url)
    user, has_password, host = parts.netloc.rpartition("@")
    if not has_password:
        return url
    return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}"))


@asynccontextmanager
async def connect_redis(url: str) -> AsyncIterator[Redis]:
    """A client whose calls give up after `REDIS_TIMEOUT_S`; asks for one answer before it yields.

    Raises:
        ValueError: the URL cannot be read.
        PeerUnavailableError: no Redis answers there, or it refuses the password.
    """
    shown = url_without_password(url)
    try:
        redis = Redis.from_url(
            url,
            socket_timeout=REDIS_TIMEOUT_S,
            socket_connect_timeout=REDIS_TIMEOUT_S,
            retry=Retry(NoBackoff(), 1),
        )
    except ValueError as error:
        raise ValueError(
            f"cannot read the Redis URL {shown!r}: {error}; expected redis://[user:password@]host"
            ":port[/db], rediss://... or unix://path"
        ) from error
    async with redis:
        try:
            async with asyncio.timeout(REDIS_TIMEOUT_S + 1):
                await redis.ping()
        except UNREACHABLE as error:
            reason = str(error) or "no answer in time"
            raise PeerUnavailableError(f"no usable Redis at {shown}: {reason}") from error
        yield redis


class Registration:
    """A worker's own entry; made by `registered`."""

    def __init__(self) -> None:
        self.is_registered = False
        """False while Redis is out of reach."""
        self._changed = asyncio.Event()

    def refresh(self) -> None:
        """Write the record now and tell the directories, as when a worker starts to drain."""
        self._changed.set()

    async def wait(self, timeout_s: float) -> bool:
        """Return early, and True, when `refresh` was called."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        self._changed.clear()
        return True


@asynccontextmanager
async def registered(
    redis: Redis, record_source: Callable[[], WorkerRecord], *, ttl_s: float = DEFAULT_TTL_S
) -> AsyncIterator[Registration]:
    """Keep a worker's record alive inside the block; remove it on exit, before the server drains.

    The record is written anew every `ttl_s / 3` with what `record_source` says then, so that it
    carries the current load. Redis may come and go: the record is back one beat after Redis is.
    """
    registration = Registration()
    first = record_source()
    await _beat(redis, first, ttl_s, registration, is_news=True)

    async def beat_forever() -> None:
        while not _is_cancelled():
            is_news = await registration.wait(ttl_s / 3)
            await _beat(redis, record_source(), ttl_s, registration, is_news=is_news)

    try:
        async with asyncio.TaskGroup() as tasks:
            heartbeat = tasks.create_task(beat_forever(), name="registry-heartbeat")
            try:
                yield registration
            finally:
                heartbeat.cancel()
    finally:  # once no beat can bring the record back
        await _remove(redis, first)


async def _beat(
    redis: Redis, record: WorkerRecord, ttl_s: float, registration: Registration, *, is_news: bool
) -> None:
    ttl_ms = round(ttl_s * 1000)
    try:
        async with redis.pipeline(transaction=True) as pipe:
            pipe.set(
                worker_key(record.role, record.worker_id), record.SerializeToString(), px=ttl_ms
            )
            pipe.sadd(worker_ids_key(record.role), record.worker_id)
            pipe.pexpire(worker_ids_key(record.role), 10 * ttl_ms)
            if is_news or not registration.is_registered:
                pipe.publish(CHANGES_CHANNEL, record.worker_id)
            await pipe.execute()
    except UNREACHABLE as error:
        if registration.is_registered:
            logger.warning("cannot reach Redis, working on without: %s", error)
        registration.is_registered = False
    else:
        if not registration.is_registered:
            logger.info("registered worker_id=%s", record.worker_id)
        registration.is_registered = True


async def _remove(redis: Redis, record: WorkerRecord) -> None:
    try:
        async with asyncio.timeout(REDIS_TIMEOUT_S), redis.pipeline(transaction=True) as pipe:
            pipe.delete(worker_key(record.role, record.worker_id))
            pipe.srem(worker_ids_key(record.role), record.worker_id)
            pipe.publish(CHANGES_CHANNEL, record.worker_id)
            await pipe.execute()
    except UNREACHABLE as error:
        logger.warning("cannot leave the registry, the record will expire: %s", error)


class WorkerDirectory:
    """The workers that Redis knows, as a view that is always at hand.

    Use as `async with WorkerDirectory(redis, roles=[...]) as directory`. With Redis gone the last
    view stays and `is_stale` is True. When Redis is back, workers that it does not know yet are
    kept for `settle_s`, because a Redis that lost its memory learns of them one heartbeat later.
    """

    def __init__(
        self,
        redis: Redis,
        *,
        roles: Iterable[WorkerRole],
        poll_s: float = 0.5,
        settle_s: float = DEFAULT_TTL_S,
    ) -> None:
        self.is_stale = True
        self.num_bad_records = 0
        self._redis = redis
        self._roles = tuple(roles)
        self._poll_s = poll_s
        self._settle_s = settle_s
        self._settled_at_s: float | None = None
        self._view: dict[WorkerRole, dict[str, WorkerRecord]] = {role: {} for role in self._roles}
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()
        self._callbacks: list[Callable[[], None]] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        await self._refresh()
        await self._stack.enter_async_context(self._watching())
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool | None:
        return await self._stack.__aexit__(exc_type, exc, traceback)

    def workers(self, role: WorkerRole) -> list[WorkerRecord]:
        """The last view, by worker id; draining workers included."""
        return list(self._view[role].values())

    def worker(self, role: WorkerRole, worker_id: str) -> WorkerRecord | None:
        return self._view[role].get(worker_id)

    def on_change(self, callback: Callable[[], None]) -> None:
        """Call back on the loop when a worker came, went, restarted or drains, or staleness flips.

        Load changes with every heartbeat and does not count.
        """
        self._callbacks.append(callback)

    async def wait_for(self, role: WorkerRole, count: int) -> list[WorkerRecord]:
        """Wait until at least `count` workers are there; the caller sets the time limit."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._view[role]) >= count)
        return self.workers(role)

    @asynccontextmanager
    async def _watching(self) -> AsyncIterator[None]:
        async with asyncio.TaskGroup() as tasks:
            polling = tasks.create_task(self._poll(), name="registry-poll")
            listening = tasks.create_task(self._listen(), name="registry-listen")
            try:
                yield
            finally:
                polling.cancel()
                listening.cancel()

    async def _poll(self) -> None:
        while not _is_cancelled():
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()
            await self._refresh()

    async def _listen(self) -> None:
        """Only makes polls prompt; without it the view is `poll_s` late."""
        while not _is_cancelled():
            try:
                async with self._redis.pubsub() as pubsub:
                    await pubsub.subscribe(CHANGES_CHANNEL)
                    while not _is_cancelled():
                        if await pubsub.get_message(timeout=REDIS_TIMEOUT_S / 2):
                            self._wake.set()
            except UNREACHABLE:
                await asyncio.sleep(self._poll_s)

    async def _refresh(self) -> None:
        before = self._identity()
        try:
            found = {role: await self._read(role) for role in self._roles}
        except UNREACHABLE as error:
            if not self.is_stale:
                logger.warning("cannot reach Redis, serving from the last view: %s", error)
            self.is_stale = True
            self._settled_at_s = None
        else:
            self._merge(found)
        if self._identity() != before:
            async with self._changed:
                self._changed.notify_all()
            for callback in self._callbacks:
                callback()

    def _merge(self, found: dict[WorkerRole, dict[str, WorkerRecord]]) -> None:
        """Take `found` as the view; right after an outage, add who was known before."""
        if not self.is_stale:
            self._view = found
            return
        now_s = asyncio.get_running_loop().time()
        if self._settled_at_s is None:
            self._settled_at_s = now_s + self._settle_s
        is_missing_some = any(self._view[role].keys() - found[role].keys() for role in self._roles)
        if is_missing_some and now_s < self._settled_at_s:
            self._view = {role: self._view[role] | found[role] for role in self._roles}
        else:
            self._view = found
            self.is_stale = False
            logger.info("the view of the registry is fresh")

    async def _read(self, role: WorkerRole) -> dict[str, WorkerRecord]:
        members = await self._redis.smembers(worker_ids_key(role))
        worker_ids = sorted(_bytes_from(member).decode(errors="replace") for member in members)
        if not worker_ids:
            return {}
        values = await self._redis.mget([worker_key(role, worker_id) for worker_id in worker_ids])
        records: dict[str, WorkerRecord] = {}
        for worker_id, value in zip(worker_ids, values, strict=True):
            if value is None:  # expired; its worker puts the id back with its next beat, if any
                await self._redis.srem(worker_ids_key(role), worker_id)
            elif record := self._parsed(role, worker_id, _bytes_from(value)):
                records[worker_id] = record
        return records

    def _parsed(self, role: WorkerRole, worker_id: str, value: bytes) -> WorkerRecord | None:
        record = WorkerRecord()
        try:
            if len(value) <= MAX_RECORD_BYTES:
                record.ParseFromString(value)
        except DecodeError:
            record.Clear()
        if record.worker_id == worker_id and record.role == role and record.address:
            return record
        self.num_bad_records += 1
        logger.warning("ignoring a bad worker record worker_id=%s", worker_id)
        return None

    def _identity(self) -> tuple[object, ...]:
        """What `on_change` looks at."""
        return (
            self.is_stale,
            *(
                (record.worker_id, record.epoch, record.address, record.draining)
                for view in self._view.values()
                for record in view.values()
            ),
        )


def _bytes_from(reply: bytes | str) -> bytes:
    """Replies are bytes; only a client made with decode_responses, which is not ours, has str."""
    return reply if isinstance(reply, bytes) else reply.encode()


def _is_cancelled() -> bool:
    """Whether this task was told to end, even if a Redis call swallowed the CancelledError.

    NOTE: redis-py sends through asyncio.wait_for, which on Python 3.11 returns its result, and
    drops the cancellation, when both come in the same turn of the loop.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
