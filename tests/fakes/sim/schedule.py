"""One simulated schedule: requests, faults, and what must be so all along and at the end."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from typing import Any, Generic, TypeVar

from engine.errors import IsthmusError
from engine.request import Request, SamplingParams
from engine.runtime.commands import SequenceMode, TokenEvent
from mesh.status import deliberate_error
from prefill_worker.prefill import PrefillJob
from tests.fakes.engine import expected_tokens
from tests.fakes.sim.chance import ALL_FAULTS, Chance, Fault, Plan
from tests.fakes.sim.network import Network, Process
from tests.fakes.sim.planes import ReceivingEnd
from tests.fakes.sim.watch import Watch
from tests.fakes.sim.workers import SimDecode, SimPrefill, decode_worker, prefill_worker
from tests.fakes.virtual_time import run_in_virtual_time

GIVE_UP_S = 15.0
"""The gateway's patience with one request."""
SETTLE_S = 100.0
"""Longer than any writer is held up."""

Worker = TypeVar("Worker", SimPrefill, SimDecode)


def run_schedule(plan: Plan, *, is_tracing: bool = False) -> Watch:
    """Run a plan; what went wrong is in `violations` of what it returns."""
    watch = Watch(is_tracing=is_tracing)
    root = logging.getLogger()
    was_disabled = root.manager.disable
    logging.disable(logging.WARNING)
    root.addHandler(watch)
    try:
        run_in_virtual_time(_Schedule(plan, watch).run())
    finally:
        root.removeHandler(watch)
        logging.disable(was_disabled)
    return watch


class Host(Generic[Worker]):
    """A place for one worker: after a crash another one takes it."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self.worker: Worker
        self._keeper: asyncio.Task[None]
        self._num_starts = 0

    async def start(self) -> None:
        self._num_starts += 1
        is_up = asyncio.get_running_loop().create_future()

        async def keep() -> None:
            context: AbstractAsyncContextManager[Worker] = self._make(self._num_starts)
            async with context as self.worker:
                is_up.set_result(None)
                await asyncio.Event().wait()

        self._keeper = asyncio.create_task(keep())
        await asyncio.wait([self._keeper, is_up], return_when=asyncio.FIRST_COMPLETED)
        if self._keeper.done():
            self._keeper.result()

    async def crash(self) -> None:
        """From this moment on it does nothing that others could notice."""
        self.worker.process.die()
        await self.stop()

    async def stop(self) -> None:
        self._keeper.cancel()
        await asyncio.wait([self._keeper])
        if not self._keeper.cancelled() and (error := self._keeper.exception()) is not None:
            raise error


class _Schedule:
    def __init__(self, plan: Plan, watch: Watch) -> None:
        self.watch = watch
        self.chance = chance = Chance(plan)
        self.network = Network(chance, watch)
        self.num_requests = plan.num_requests
        self.calls: dict[str, asyncio.Task[object]] = {}
        ends: dict[str, ReceivingEnd] = {}
        plane = ("shm", "tcp")[chance.integer(0, 1)]
        num_blocks = chance.integer(6, 14)
        self.prefills: list[Host[SimPrefill]] = [
            Host(self._prefill_maker(f"p{index}", ends, plane)) for index in range(2)
        ]
        self.decode: Host[SimDecode] = Host(
            lambda n: decode_worker(f"d#{n}", self.network, ends, num_blocks=num_blocks)
        )
        self.hosts: list[Host[Any]] = [self.decode, *self.prefills]

    async def run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(self.watch.on_loop_error)
        for host in self.hosts:
            await host.start()
        async with asyncio.timeout(300), asyncio.TaskGroup() as tasks:
            for index in range(self.num_requests):
                tasks.create_task(self._request(f"r{index}"))
            tasks.create_task(self._partition())
            for host in self.hosts:
                tasks.create_task(self._crash(host))
        self.chance.heal()
        await self._settle()
        for host in self.hosts:
            await host.stop()

    def _prefill_maker(self, name: str, ends: dict[str, ReceivingEnd], plane: str) -> Any:
        return lambda n: prefill_worker(
            name, self.network, ends, num_blocks=self.chance.integer(8, 16), plane=plane
        )

    # One request, as a gateway drives it.

    async def _request(self, request_id: str) -> None:
        chance = self.chance
        await asyncio.sleep(chance.uniform(0.0, 2.0))
        family, num_shared = chance.integer(0, 2), chance.integer(0, 10)
        prompt = [family * 100 + index for index in range(num_shared)]
        prompt += [chance.integer(300, 900) for _ in range(chance.integer(1, 12))]
        request = Request(
            request_id=request_id,
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(max_tokens=chance.integer(2, 6), ignore_eos=True),
        )
        decode = self.decode.worker
        prefill = self.prefills[chance.integer(0, 1)].worker
        await asyncio.sleep(chance.uniform(-0.02, 0.02))
        computing = asyncio.create_task(self._compute(request, prefill, decode))
        leaving = asyncio.create_task(self._until_it_leaves())
        await asyncio.wait([computing, leaving], return_when=asyncio.FIRST_COMPLETED)
        for task in (computing, leaving):
            task.cancel()
            if task.done() and not task.cancelled():
                task.result()
        # Both workers are told, at different times, or one of them never hears of it.
        is_silent = chance.hits(Fault.DROP, 0.2)
        if (call := self.calls.get(request_id)) is not None and chance.hits(Fault.ABORT, 0.5):
            call.cancel()  # as gRPC does when it hears of it
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._abort(decode.process, decode.abort, request_id))
            if not is_silent:
                tasks.create_task(self._abort(prefill.process, prefill.prefiller.abort, request_id))

    async def _until_it_leaves(self) -> None:
        """A client goes away at any time, or in the moment in which something happens."""
        chance = self.chance
        if not chance.hits(Fault.ABORT, 0.4):
            await asyncio.sleep(GIVE_UP_S)
        elif chance.uniform(0, 1) < 0.3:
            await asyncio.sleep(chance.uniform(0.0, 0.6))
        else:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(GIVE_UP_S):
                    await self.network.wait_for_pulse(chance.integer(1, 60))

    async def _abort(
        self, process: Process, abort: Callable[[str], Awaitable[object]], request_id: str
    ) -> None:
        async def aborting() -> None:
            try:
                await abort(request_id)
            except IsthmusError as error:  # it crashes
                self.watch.note("abort failed", repr(error))

        await asyncio.sleep(max(0.0, self.chance.uniform(-0.05, 0.05)))
        if process.is_alive:
            await asyncio.wait([process.spawn(aborting())])

    async def _compute(self, request: Request, prefill: SimPrefill, decode: SimDecode) -> None:
        chance = self.chance
        if chance.hits(Fault.DELAY, 0.5):
            await asyncio.sleep(chance.uniform(0.0, 0.05))
        decode.stream.submit(request, SequenceMode.DECODE, trace_context=None)
        if chance.hits(Fault.DELAY, 0.5):
            await asyncio.sleep(chance.uniform(0.0, 0.05))
        first: list[int] = []

        async def on_token(token: TokenEvent) -> None:
            first.append(token.token_id)

        job = PrefillJob(
            request=request,
            decode_worker_id=decode.process.host,
            decode_address=decode.process.host,
        )
        running = prefill.process.spawn(prefill.prefiller.run(job, on_token))
        self.calls[request.request_id] = running
        running.add_done_callback(lambda _: running.cancelled() or running.exception())
        # Not cancelled with the wait: a prefill worker goes on until it is told.
        await asyncio.wait([running])
        if running.cancelled():
            return
        if (error := running.exception()) is not None:
            if not isinstance(deliberate_error(error), IsthmusError):
                self.watch.violate(f"{request.request_id} failed with {error!r}")
            return
        num_tokens = request.sampling.max_tokens
        while len(decode.tokens.get(request.request_id, ())) < num_tokens - 1:
            if not decode.process.is_alive:
                return
            await asyncio.sleep(0.01)
        found = first + decode.tokens[request.request_id]
        if found != expected_tokens(request.prompt_token_ids, num_tokens):
            self.watch.violate(f"{request.request_id} was answered with {found}")
        self.watch.note(request.request_id, "is answered")

    # What goes wrong by itself.

    async def _partition(self) -> None:
        chance = self.chance
        if not chance.hits(Fault.PARTITION, 0.25):
            return
        await asyncio.sleep(chance.uniform(0.0, 2.5))
        pair = frozenset(("d", f"p{chance.integer(0, 1)}"))
        self.network.cut_off.add(pair)
        await asyncio.sleep(chance.uniform(0.1, 3.0))
        self.network.cut_off.discard(pair)

    async def _crash(self, host: Host[Any]) -> None:
        chance = self.chance
        is_receiver = host is self.decode
        fault = Fault.CRASH_RECEIVER if is_receiver else Fault.CRASH_SENDER
        if not chance.hits(fault, 0.12):
            return
        await asyncio.sleep(chance.uniform(0.0, 2.5))
        self.watch.note(host.worker.process.name, "crashes")
        await host.crash()
        await asyncio.sleep(chance.uniform(0.0, 0.5))
        await host.start()

    # The end.

    async def _settle(self) -> None:
        """Nothing is asked for any more: everything must come back by itself."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + SETTLE_S
        while (held := self._held()) and loop.time() < end_s:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.5)
        if held:
            self.watch.violate("held for ever: " + ", ".join(held))
        for host in self.hosts:
            host.worker.engine.scheduler.check_conservation()

    def _held(self) -> list[str]:
        held = []
        for host in self.hosts:
            worker = host.worker
            scheduler = worker.engine.scheduler
            counts = {
                "blocks": scheduler.limits.num_blocks - scheduler.block_pool.num_free,
                "sequences": scheduler.num_sequences,
                "reservations": len(scheduler.reservations),
            }
            if host is self.decode:
                counters = worker.receiver.counters
                counts["leases"] = counters.num_live_leases
                counts["quarantine"] = counters.num_quarantined_leases
                counts["waiting"] = counters.num_waiting_reserves
            else:
                counts["handovers"] = worker.sender.counters.num_open_handovers
            held += [f"{n} {what} by {worker.process.name}" for what, n in counts.items() if n]
        return held


def first_violation(seeds: Iterable[int], faults: frozenset[Fault] = ALL_FAULTS) -> Watch | None:
    """Run plans until one goes wrong."""
    for seed in seeds:
        watch = run_schedule(Plan(seed, faults=faults))
        if watch.violations:
            return watch
    return None


def explained(plan: Plan) -> str:
    """A plan that goes wrong, made smaller, with what happens in it."""
    plan = _shrunk(plan)
    watch = run_schedule(plan, is_tracing=True)
    return "\n".join([f"{plan}:", *watch.violations, "", *watch.trace])


def _shrunk(plan: Plan) -> Plan:
    """Fewer requests and fewer kinds of faults, as long as it still goes wrong.

    A change shifts what the seed means, so some other seeds are tried with it.
    """
    while True:
        smaller = [replace(plan, faults=plan.faults - {fault}) for fault in sorted(plan.faults)]
        if plan.num_requests > 1:
            smaller.insert(0, replace(plan, num_requests=plan.num_requests - 1))
        attempts = (
            replace(candidate, seed=plan.seed + step * 1_000_003)
            for candidate in smaller
            for step in range(30)
        )
        found = next((attempt for attempt in attempts if run_schedule(attempt).violations), None)
        if found is None:
            return plan
        plan = found
