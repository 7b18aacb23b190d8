import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks import report, serving
from benchmarks.load import comparison
from benchmarks.load.driver import Driver, Run
from benchmarks.load.figures import figures_of
from benchmarks.load.outcome import Outcome, write_outcome
from benchmarks.load.scenario import ClosedLoad, Load, MixedLoad, OpenLoad
from benchmarks.load.schedule import PromptSource, TokenRange
from benchmarks.load.target import Target, find_target
from engine.errors import InvalidRequestError

TOKENS = TokenRange(start=10, stop=1000)


@dataclass
class FakeServer:
    """A tiny OpenAI server: one chunk a token, in two writes each, and a record of what it saw."""

    port: int = 0
    seen: list[dict[str, Any]] = field(default_factory=list)
    num_open: int = 0
    max_open: int = 0
    num_dropped: int = 0
    missing_tokens: int = 0
    refuse_after: int = 10**9

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"GET /v1/models"):
                await self._whole(writer, b"200 OK", b'{"data": [{"id": "fake-model"}]}')
                return
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            body = json.loads(await reader.readexactly(size))
            self.seen.append(body)
            if len(self.seen) > self.refuse_after:
                await self._whole(writer, b"503 Busy", b'{"error": "busy"}')
                return
            await self._stream(writer, body["max_tokens"])
        except (ConnectionError, asyncio.IncompleteReadError):
            self.num_dropped += 1
        finally:
            writer.close()

    async def _stream(self, writer: asyncio.StreamWriter, max_tokens: int) -> None:
        self.num_open += 1
        self.max_open = max(self.max_open, self.num_open)
        try:
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            num_tokens = max_tokens - self.missing_tokens
            for index in range(num_tokens):
                await self._event(writer, {"choices": [{"text": str(index)}]})
                await asyncio.sleep(0.001)  # the fake's decode step
            usage = {"completion_tokens": num_tokens}
            await self._event(writer, {"choices": [], "usage": usage})
            writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            await writer.drain()
        finally:
            self.num_open -= 1

    async def _event(self, writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
        if writer.is_closing():
            raise ConnectionResetError
        data = b"data: " + json.dumps(event).encode() + b"\n\n"
        framed = b"%x\r\n%s\r\n" % (len(data), data)
        writer.write(framed[:9])
        writer.write(framed[9:])
        await writer.drain()

    async def _whole(self, writer: asyncio.StreamWriter, status: bytes, body: bytes) -> None:
        writer.write(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n" % (status, len(body)))
        writer.write(b"Connection: close\r\n\r\n" + body)
        await writer.drain()


@asynccontextmanager
async def serving_fake(fake: FakeServer) -> AsyncIterator[FakeServer]:
    async with await asyncio.start_server(fake.serve, "127.0.0.1", 0) as server:
        fake.port = server.sockets[0].getsockname()[1]
        yield fake


async def play(fake: FakeServer, load: Load) -> Run:
    target = Target(name="fake", host="127.0.0.1", port=fake.port, model="fake-model")
    return await Driver(target, TOKENS).play(load, seed=1)


CLOSED = ClosedLoad(
    name="closed", prompt_tokens=5, output_tokens=3, num_concurrent=4, num_requests=10
)
MIXED = MixedLoad(
    name="mixed",
    num_streams=2,
    stream_prompt_tokens=4,
    stream_output_tokens=40,
    phase_s=0.2,
    long_prompt_tokens=50,
    long_output_tokens=2,
    long_every_s=0.1,
)


async def test_closed_load_keeps_so_many_open_and_excludes_warm_up() -> None:
    async with serving_fake(FakeServer()) as fake:
        run = await play(fake, CLOSED)
    figures = figures_of([run.windows["closed"]])
    assert figures.errors == {}
    assert figures.num_requests == 10
    assert figures.output_tokens == 30
    assert figures.itl is not None
    assert figures.itl.count == 20
    assert fake.max_open == 4
    assert len(fake.seen) == 10 + 4


async def test_requests_ask_for_exactly_the_tokens_of_the_load() -> None:
    async with serving_fake(FakeServer()) as fake:
        await play(fake, CLOSED)
    body = fake.seen[-1]
    assert len(body.pop("prompt")) == 5
    assert body == {
        "model": "fake-model",
        "max_tokens": 3,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    prompts = [tuple(request["prompt"]) for request in fake.seen if "prompt" in request]
    assert len(set(prompts)) == len(prompts)


async def test_open_load_counts_from_the_time_it_was_due() -> None:
    load = OpenLoad(
        name="open", prompt_tokens=5, output_tokens=2, requests_per_s=100.0, num_requests=20
    )
    async with serving_fake(FakeServer()) as fake:
        run = await play(fake, load)
    answers = run.windows["open"].answers
    due_s = [p.at_s for p in PromptSource(TOKENS, seed=1, name="open").poisson(20, 5, 2, per_s=100)]
    start_s = answers[0].start_s - due_s[0]
    assert [answer.start_s - start_s for answer in answers] == pytest.approx(due_s, abs=1e-9)
    assert figures_of([run.windows["open"]]).errors == {}


async def test_mixed_load_measures_the_streams_alone_and_disturbed() -> None:
    async with serving_fake(FakeServer()) as fake:
        run = await play(fake, MIXED)
        figures = {phase: figures_of([window]) for phase, window in run.windows.items()}
    assert list(figures) == ["mixed alone", "mixed disturbed", "mixed prompts"]
    assert all(figure.errors == {} for figure in figures.values())
    assert figures["mixed alone"].output_tokens > 40
    assert figures["mixed alone"].duration_s == pytest.approx(0.2)
    assert figures["mixed disturbed"].itl is not None
    assert figures["mixed prompts"].num_requests == 2
    # Streams shorter than the phase are followed by others; the long prompts keep their number.
    assert len([request for request in fake.seen if len(request["prompt"]) == 50]) == 2 + 1
    assert len([request for request in fake.seen if len(request["prompt"]) == 4]) > 2 * 2 + 2


async def test_refused_requests_are_errors_and_the_load_goes_on() -> None:
    async with serving_fake(FakeServer(refuse_after=4 + 6)) as fake:
        run = await play(fake, CLOSED)
    figures = figures_of([run.windows["closed"]])
    assert figures.errors == {'status 503: {"error": "busy"}': 4}
    assert figures.output_tokens == 6 * 3


async def test_mixed_load_ends_when_the_streams_are_refused() -> None:
    async with serving_fake(FakeServer(refuse_after=3)) as fake:
        run = await play(fake, MIXED)
    assert figures_of([run.windows["mixed alone"]]).num_errors == 2


async def test_a_server_that_fails_the_warm_up_is_not_measured() -> None:
    async with serving_fake(FakeServer(missing_tokens=1)) as fake:
        with pytest.raises(ConnectionError, match="2 tokens instead of 3"):
            await play(fake, CLOSED)


@pytest.mark.parametrize("text", ["http://127.0.0.1:1", "x=https://127.0.0.1:1", "x=http://h/v1"])
async def test_a_target_that_is_not_name_and_url_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="NAME=http"):
        await find_target(text)


async def test_a_target_that_does_not_answer_is_named() -> None:
    async with serving_fake(FakeServer()) as fake:
        url = fake.url
    with pytest.raises(InvalidRequestError, match="peer: no list of models"):
        await find_target(f"peer={url}")


def closed_prompts(fake: FakeServer) -> list[list[int]]:
    """What the closed load and its warm-up sent, repeats included; arrival order is the loop's."""
    return sorted(body["prompt"] for body in fake.seen if len(body["prompt"]) == 5)


async def half_a_core() -> float:
    return 0.5


async def test_a_run_compares_targets_and_its_file_can_be_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        serving, "standard_loads", lambda *, is_quick: {"closed": CLOSED, "mixed": MIXED}
    )
    monkeypatch.setattr(comparison, "_busy_cores", half_a_core)
    async with serving_fake(FakeServer()) as mesh, serving_fake(FakeServer()) as vllm:
        options = serving.parsed(
            ["--target", f"mesh={mesh.url}", "--target", f"vllm={vllm.url}", "--repeat", "2"]
        )
        outcome = await serving.run(options, [])
    so_far = capsys.readouterr().err
    assert so_far.index("closed  vllm") < so_far.index("mixed alone")
    assert closed_prompts(mesh) == closed_prompts(vllm)
    assert len(set(map(tuple, closed_prompts(mesh)))) == 2 * (10 + 4)
    assert {verdict.target for verdict in outcome.verdicts} == {"mesh", "vllm"}
    assert all(len(row.tokens_per_s_by_repeat) == 2 for row in outcome.rows)

    file = tmp_path / "serving.json"
    write_outcome(file, outcome)
    assert msgspec.json.decode(file.read_bytes(), type=Outcome).targets == outcome.targets
    assert report.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert "| mixed disturbed | vllm |" in printed
    assert "noise: 0.5 cores were busy before mixed on mesh" in printed
    assert "mesh: closed: output tokens/s as a share of vllm's >= 1" in printed
