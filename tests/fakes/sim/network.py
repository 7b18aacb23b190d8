"""gRPC between simulated processes: every message may be late, lost or repeated."""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass, field
from typing import Any

from grpc import ChannelConnectivity, StatusCode, aio

from engine.errors import IsthmusError
from kv_transfer.receiver import KvReceiver
from kv_transfer.servicer import KvTransferServicer
from mesh.status import ERROR_TRAILER, deliberate_error, status_of
from protos.isthmus.v1 import kv_transfer_pb2 as pb
from tests.fakes.sim.chance import Chance, Fault
from tests.fakes.sim.watch import Watch


@dataclass(eq=False, slots=True)
class Process:
    """What dies together: when it is dead it sends nothing, hears nothing and writes nothing."""

    name: str
    host: str
    is_alive: bool = True
    tasks: dict[asyncio.Task[Any], None] = field(default_factory=dict)
    """In the order in which they began: a set's order is another one in each run."""

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks[task] = None
        task.add_done_callback(self.tasks.pop)
        return task

    def die(self) -> None:
        self.is_alive = False
        for task in list(self.tasks):
            task.cancel()


@dataclass(frozen=True, slots=True)
class Server:
    process: Process
    receiver: KvReceiver


class Network:
    """Carries messages; `cut_off` holds pairs of hosts between which nothing passes now."""

    def __init__(self, chance: Chance, watch: Watch) -> None:
        self.chance = chance
        self.watch = watch
        self.servers: dict[str, Server] = {}
        self.cut_off: set[frozenset[str]] = set()
        self._num_pulses = 0
        self._at_pulse: dict[int, list[asyncio.Event]] = {}

    def passes(self, one: str, other: str) -> bool:
        return frozenset((one, other)) not in self.cut_off

    def pulse(self) -> None:
        """Something has happened: somebody may want something else at this very moment."""
        self._num_pulses += 1
        for event in self._at_pulse.pop(self._num_pulses, ()):
            event.set()

    async def wait_for_pulse(self, num_pulses: int) -> None:
        """Return when so many more things have happened."""
        event = asyncio.Event()
        self._at_pulse.setdefault(self._num_pulses + num_pulses, []).append(event)
        await event.wait()

    def send(self, source: Process, host: str, deliver: Callable[[], None]) -> bool:
        """Let `deliver` be called there some time later; False when the message is lost."""
        chance = self.chance
        if (
            chance.hits(Fault.DROP, 0.03)
            or not source.is_alive
            or not self.passes(source.host, host)
        ):
            return False
        delay_s = chance.uniform(0.0001, 0.003)
        if chance.hits(Fault.DELAY, 0.06):
            delay_s = chance.uniform(0.0, 4.0)

        def arrive() -> None:
            deliver()
            self.pulse()

        asyncio.get_running_loop().call_later(delay_s, arrive)
        return True


class SimChannel:
    """Stands for an aio.Channel of `client`; its calls go to whoever serves at `address` then."""

    def __init__(self, network: Network, client: Process, address: str) -> None:
        self._network = network
        self._client = client
        self._address = address

    def get_state(self) -> ChannelConnectivity:
        return ChannelConnectivity.READY

    def unary_unary(
        self,
        path: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        **_: object,
    ) -> Callable[..., "SimCall"]:
        method = path.rpartition("/")[2]

        def call(request: Any, *, timeout: float) -> SimCall:
            data = request_serializer(request)
            sim_call = SimCall(self._network, self._client, self._address, method)
            sim_call.start(data, response_deserializer, timeout)
            return sim_call

        return call

    async def close(self) -> None:
        """Holds nothing."""


class SimCall:
    """One call, as the client sees it."""

    def __init__(self, network: Network, client: Process, address: str, method: str) -> None:
        self._network = network
        self._client = client
        self._address = address
        self._method = method
        self._handlers: list[asyncio.Task[Any]] = []
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[Any] = self._loop.create_future()

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._done.__await__()

    def cancel(self) -> bool:
        return self._done.cancel()

    def start(self, data: bytes, decode: Callable[[bytes], Any], timeout_s: float) -> None:
        network, chance = self._network, self._network.chance
        self._timer = self._loop.call_later(timeout_s, self._fail, StatusCode.DEADLINE_EXCEEDED)
        self._done.add_done_callback(self._end)

        def arrive() -> None:
            server = network.servers.get(self._address)
            if server is None or not server.process.is_alive:
                self._fail(StatusCode.UNAVAILABLE)
            elif not self._done.cancelled():  # else the cancellation was faster
                self._handlers.append(server.process.spawn(self._serve(server, data, decode)))

        def arrive_again() -> None:
            server = network.servers.get(self._address)
            if server is not None and server.process.is_alive:
                server.process.spawn(self._serve(server, data, decode))

        network.watch.note(self._client.name, "calls", self._method)
        if not network.send(self._client, self._address, arrive):
            self._break_perhaps()
        if chance.hits(Fault.DUPLICATE, 0.06):
            self._loop.call_later(chance.uniform(0.0, 12.0), arrive_again)

    async def _serve(self, server: Server, data: bytes, decode: Callable[[bytes], Any]) -> None:
        servicer = KvTransferServicer(server.receiver)
        request = getattr(pb, f"{self._method}Request").FromString(data)
        answer: Callable[[], None]
        try:
            response = await getattr(servicer, self._method)(request, _Context(self._client.name))
            encoded = response.SerializeToString()
        except Exception as error:  # noqa: BLE001 - as the status interceptor
            if not isinstance(deliberate_error(error), IsthmusError):
                self._network.watch.violate(f"{self._method} raised {error!r}")
            code, text = status_of(error)
            name = type(deliberate_error(error)).__name__
            self._network.watch.note(server.process.name, "refuses", self._method, name, text)

            def answer() -> None:
                self._fail(code, text, name)
        else:
            self._network.watch.note(server.process.name, "answers", self._method)

            def answer() -> None:
                if not self._done.done():
                    self._done.set_result(decode(encoded))

        if not self._network.send(server.process, self._client.host, answer):
            self._break_perhaps()

    def _break_perhaps(self) -> None:
        """A lost message is noticed as a broken connection, or not before the deadline."""
        after_s = self._network.chance.uniform(-0.5, 0.5)
        if after_s > 0:
            self._loop.call_later(after_s, self._fail, StatusCode.UNAVAILABLE)

    def _fail(self, code: StatusCode, text: str = "", name: str = "") -> None:
        if self._done.done():
            return
        trailers = aio.Metadata((ERROR_TRAILER, name)) if name else aio.Metadata()
        self._done.set_exception(aio.AioRpcError(code, aio.Metadata(), trailers, details=text))
        self._done.exception()

    def _end(self, done: "asyncio.Future[Any]") -> None:
        self._timer.cancel()
        if done.cancelled() or done.exception() is not None:  # the server hears of it, perhaps
            self._network.send(self._client, self._address, self._cancel_handlers)

    def _cancel_handlers(self) -> None:
        for handler in self._handlers:
            handler.cancel()


@dataclass(frozen=True, slots=True)
class _Context:
    name: str

    def peer(self) -> str:
        return self.name
