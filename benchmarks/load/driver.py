"""Plays a load on one server, in this process' event loop, and returns the windows measured."""

import asyncio
import gc
import resource
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from benchmarks.load.answer import Answer, answer_from
from benchmarks.load.exchange import Exchange, perform
from benchmarks.load.figures import Window
from benchmarks.load.process_cpu import CpuMeter, used_between
from benchmarks.load.scenario import ClosedLoad, Load, MixedLoad, OpenLoad, TraceLoad
from benchmarks.load.schedule import Prompt, PromptSource, TokenRange, exchange_for
from benchmarks.load.target import Target
from benchmarks.load.trace import prompts_of_trace

OK = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One load played once: its windows by phase, and what the client itself cost."""

    windows: dict[str, Window]
    client_cpu_s: float
    server_cpu_s: dict[str, float]
    """By process, as far as the target's processes are known."""

    @property
    def answers(self) -> list[Answer]:
        return [answer for window in self.windows.values() for answer in window.answers]


class Driver:
    """Plays loads on `target` with prompts drawn from `tokens`."""

    def __init__(self, target: Target, tokens: TokenRange) -> None:
        self._target = target
        self._tokens = tokens

    async def play(self, load: Load, *, seed: int) -> Run:
        """Warm up, then measure. The same seed gives every target the same requests."""
        source = PromptSource(self._tokens, seed=seed, name=load.name)
        await self._warm_up(load, PromptSource(self._tokens, seed=seed, name=f"{load.name}/warm"))
        match load:
            case ClosedLoad():
                return await self._closed(load, source)
            case OpenLoad():
                prompts = source.poisson(
                    load.num_requests,
                    load.prompt_tokens,
                    load.output_tokens,
                    per_s=load.requests_per_s,
                )
                return await self._open(load.name, prompts)
            case TraceLoad():
                return await self._open(load.name, prompts_of_trace(load, source))
            case MixedLoad():
                return await self._mixed(load, source)

    async def _warm_up(self, load: Load, source: PromptSource) -> None:
        match load:
            case ClosedLoad():
                prompts = source.prompts(
                    load.num_concurrent, load.prompt_tokens, min(16, load.output_tokens)
                )
            case OpenLoad():
                prompts = source.prompts(2, load.prompt_tokens, load.output_tokens)
            case TraceLoad():
                prompts = source.prompts(2, load.max_prompt_tokens, 16)
            case MixedLoad():
                prompts = [
                    *source.prompts(load.num_streams, load.stream_prompt_tokens, 16),
                    source.prompt(load.long_prompt_tokens, load.long_output_tokens),
                ]
        exchanges = self._exchanges(prompts)
        async with asyncio.TaskGroup() as tasks:
            for exchange in exchanges:
                tasks.create_task(self._send(exchange))
        for exchange in exchanges:
            if error := answer_from(exchange).error:
                raise ConnectionError(f"{self._target.name} failed a warm-up request: {error}")

    async def _closed(self, load: ClosedLoad, source: PromptSource) -> Run:
        exchanges = self._exchanges(
            source.prompts(load.num_requests, load.prompt_tokens, load.output_tokens)
        )
        waiting = iter(exchanges)

        async def caller() -> None:
            for exchange in waiting:
                await self._send(exchange)

        with _measured(self._target.meter) as cost:
            async with asyncio.TaskGroup() as tasks:
                for index in range(load.num_concurrent):
                    tasks.create_task(caller(), name=f"caller-{index}")
        return cost.run({load.name: _window_around(exchanges)})

    async def _open(self, name: str, prompts: Sequence[Prompt]) -> Run:
        exchanges = self._exchanges(prompts)
        with _measured(self._target.meter) as cost:
            async with asyncio.TaskGroup() as tasks:
                start_s = time.perf_counter()
                for prompt, exchange in zip(prompts, exchanges, strict=True):
                    await _until(start_s + prompt.at_s)
                    tasks.create_task(self._send(exchange, start_s=start_s + prompt.at_s))
        return cost.run({name: _window_around(exchanges)})

    async def _mixed(self, load: MixedLoad, source: PromptSource) -> Run:
        long_exchanges = self._exchanges(
            source.prompts(load.num_long_prompts, load.long_prompt_tokens, load.long_output_tokens)
        )
        with _measured(self._target.meter) as cost:
            async with self._streams(load, source) as alone_streams:
                alone_s = time.perf_counter()
                await _until(alone_s + load.phase_s)
            async with self._streams(load, source) as streams, asyncio.TaskGroup() as tasks:
                start_s = time.perf_counter()
                tasks.create_task(self._every(load.long_every_s, long_exchanges))
                await _until(start_s + load.phase_s)
                # The streams decode on until the last long prompt is answered: outside the window.
        return cost.run(
            {
                f"{load.name} alone": _window(alone_streams, alone_s, alone_s + load.phase_s),
                f"{load.name} disturbed": _window(streams, start_s, start_s + load.phase_s),
                f"{load.name} prompts": _window_around(long_exchanges),
            }
        )

    async def _every(self, period_s: float, exchanges: Sequence[Exchange]) -> None:
        start_s = time.perf_counter()
        async with asyncio.TaskGroup() as tasks:
            for index, exchange in enumerate(exchanges):
                await _until(start_s + index * period_s)
                tasks.create_task(self._send(exchange, start_s=start_s + index * period_s))

    @asynccontextmanager
    async def _streams(
        self, load: MixedLoad, source: PromptSource
    ) -> AsyncIterator[list[Exchange]]:
        """Keep `num_streams` answers decoding; entered when each has its first token.

        A stream that ends is replaced. Leaving drops the connections.
        """
        # Bodies for ten rounds are made ahead; nobody decodes that much in one phase.
        prompts = source.prompts(
            load.num_streams * 10, load.stream_prompt_tokens, load.stream_output_tokens
        )
        unsent = self._exchanges(prompts)
        first = unsent[: load.num_streams]
        waiting = iter(unsent)
        exchanges: list[Exchange] = []

        async def stream() -> None:
            for exchange in waiting:
                exchanges.append(exchange)
                await self._send(exchange)
                if not exchange.is_complete or exchange.status != OK:
                    return  # its error is reported; asking again would only repeat it

        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(stream()) for _ in range(load.num_streams)]
            for exchange in first:
                await exchange.begun.wait()
            yield exchanges
            for task in running:
                task.cancel()

    def _exchanges(self, prompts: Sequence[Prompt]) -> list[Exchange]:
        target = self._target
        return [exchange_for(prompt, host=target.host, model=target.model) for prompt in prompts]

    async def _send(self, exchange: Exchange, *, start_s: float | None = None) -> None:
        exchange.start_s = time.perf_counter() if start_s is None else start_s
        await perform(exchange, host=self._target.host, port=self._target.port)


@dataclass(slots=True)
class _Cost:
    client_cpu_s: float = 0.0
    server_cpu_s: dict[str, float] = field(default_factory=dict)

    def run(self, windows: dict[str, Window]) -> Run:
        return Run(windows=windows, client_cpu_s=self.client_cpu_s, server_cpu_s=self.server_cpu_s)


@contextmanager
def _measured(meter: CpuMeter) -> Iterator[_Cost]:
    """Note the CPU time used, and keep the garbage collector from pausing what is timed."""
    cost = _Cost()
    gc.collect()
    gc.disable()
    before = meter()
    before_s = _cpu_s()
    try:
        yield cost
    finally:
        cost.client_cpu_s = _cpu_s() - before_s
        cost.server_cpu_s = used_between(before, meter())
        gc.enable()


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


async def _until(when_s: float) -> None:
    await asyncio.sleep(max(0.0, when_s - time.perf_counter()))


def _window(exchanges: Sequence[Exchange], start_s: float, end_s: float) -> Window:
    answers = tuple(answer_from(exchange) for exchange in exchanges)
    return Window(answers=answers, start_s=start_s, end_s=end_s)


def _window_around(exchanges: Sequence[Exchange]) -> Window:
    return Window.around([answer_from(exchange) for exchange in exchanges])
