"""KV on its way is cut, stalled and damaged, and clients leave at any moment: nothing is wrong
afterwards, and nothing is held."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from engine.request import Request
from engine.request import SamplingParams as EngineSampling
from engine.runtime.build import build_engine
from engine.runtime.commands import SequenceMode, TokenEvent
from engine.runtime.engine import Submit
from kv_transfer.config import DataPlane, TransferConfig
from kv_transfer.prefix.fetch_cost import Choice, FetchCost
from mesh.channel import open_channel
from protos.isthmus.v1 import inference_pb2 as pb
from protos.isthmus.v1.inference_pb2_grpc import InferenceStub
from protos.isthmus.v1.sampling_pb2 import SamplingParams
from tests.checkpoints import tiny_checkpoint
from tests.fakes.faulty_relay import FaultyRelay, RelayFault
from tests.fakes.kv_store import running_store
from tests.fakes.small_mesh import ENGINE, VOCAB_SIZE, SmallMesh, small_mesh

NUM_TOKENS = 4
FAULT_SHARE = 0.05
NUM_FAULTY_REQUESTS = 400
NUM_ABORTS = 1_000
NUM_FAMILIES = 100
"""Of prompts that differ in their last token only."""
FREE_WITHIN_S = 2.0

TCP = TransferConfig(
    data_plane=DataPlane.TCP, lease_s=2.0, data_timeout_s=0.4, reserve_timeout_s=30.0
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny"), vocab_size=VOCAB_SIZE)


def prompts_of(num_prompts: int, lengths: tuple[int, int], seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [
        [generator.randrange(3, VOCAB_SIZE) for _ in range(generator.randint(*lengths))]
        for _ in range(num_prompts)
    ]


def answers_of_one_engine(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    engine = build_engine(checkpoint, ENGINE)
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        for index, prompt in enumerate(prompts):
            sampling = EngineSampling(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
            request = Request(
                request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling
            )
            engine.apply(0, Submit(request, SequenceMode.LOCAL))
        while (outputs := engine.step()) is not None:
            for output in outputs:
                if isinstance(output, TokenEvent):
                    answers[int(output.request_id)].append(output.token_id)
    finally:
        engine.close()
    return answers


@dataclass(frozen=True, slots=True)
class Client:
    stub: InferenceStub

    async def ask(self, prompt: list[int], *, max_tokens: int = NUM_TOKENS) -> AsyncIterator[int]:
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=prompt),
            sampling=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True),
        )
        async for response in self.stub.Generate(request):
            for delta in response.deltas:
                for token_id in delta.token_ids:
                    yield token_id


async def until_free(held_now: Callable[[], object], within_s: float) -> None:
    """Until `held_now` says nothing."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + within_s
    while held := held_now():
        assert loop.time() < deadline_s, held
        await asyncio.sleep(0.01)


def degradations(mesh: SmallMesh) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    for family in mesh.gateway.registry.collect():
        for sample in family.samples:
            if sample.name == "isthmus_gateway_degradations_total":
                key = sample.labels["kind"], sample.labels["reason"]
                found[key] += int(sample.value)
    return found


async def test_transfers_that_are_cut_stalled_or_damaged_change_no_token(
    checkpoint: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.runtime.kv_news.NEWS_BYTES", 1 << 14)  # some go layer by layer
    prompts = prompts_of(NUM_FAULTY_REQUESTS, (20, 90), seed=1)
    expected = answers_of_one_engine(checkpoint, prompts)
    async with asyncio.TaskGroup() as tasks:
        relays: list[FaultyRelay] = []
        is_over = asyncio.Event()

        async def relay_to(port: int) -> int:
            relay = FaultyRelay(
                ("127.0.0.1", port), share=FAULT_SHARE, stall_s=2 * TCP.data_timeout_s, seed=2
            )
            relays.append(relay)
            is_listening = asyncio.Event()

            async def keep() -> None:
                async with relay.listening():
                    is_listening.set()
                    await is_over.wait()

            tasks.create_task(keep())
            await is_listening.wait()
            return relay.port

        async with (
            small_mesh(checkpoint, TCP, redis_url, data_port=relay_to) as mesh,
            open_channel(mesh.gateway.grpc_address) as channel,
        ):
            client = Client(InferenceStub(channel))
            turns = asyncio.Semaphore(12)

            async def answer_of(prompt: list[int]) -> list[int]:
                async with turns:
                    return [token_id async for token_id in client.ask(prompt)]

            answers = await asyncio.gather(*(answer_of(prompt) for prompt in prompts))
            assert answers == expected
            await until_free(mesh.held, FREE_WITHIN_S + TCP.lease_s)
            sent, lost = mesh.sender.counters, degradations(mesh)
            (relay,) = relays
        is_over.set()

    assert set(relay.faults) == set(RelayFault)
    assert relay.faults.total() > 0.6 * FAULT_SHARE * NUM_FAULTY_REQUESTS
    # Every fault was noticed and is counted with the way out: written again, or computed again.
    failed = Counter(sent.handovers)
    num_committed = failed.pop("committed")
    assert sent.retransfers.keys() == {"broken", "corrupt"}
    assert sum(sent.retransfers.values()) + failed.total() == relay.faults.total()
    num_retransfers = Counter({r: n for (kind, r), n in lost.items() if kind == "retransfer"})
    assert num_retransfers.total() <= sum(sent.retransfers.values())
    num_again = sum(n for (kind, _), n in lost.items() if kind in ("retry", "local_prefill"))
    assert num_again >= failed.total()
    assert num_committed + failed.total() >= NUM_FAULTY_REQUESTS - num_again


@pytest.mark.parametrize("plane", [DataPlane.SHM, DataPlane.TCP])
async def test_a_thousand_clients_that_leave_at_any_moment_leave_nothing_behind(
    checkpoint: Path,
    redis: Redis,
    redis_url: str,
    plane: DataPlane,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither on the workers nor in the store, which has room for more prefixes than they have."""
    # A tiny model computes faster than any store answers.
    monkeypatch.setattr(FetchCost, "choose", lambda *_, **__: Choice(is_fetch=True, reason="probe"))
    monkeypatch.setattr("kv_transfer.prefix.publisher.MAX_WAITING", 1)  # at the end, too
    # Slow because others use the cores is not lost.
    monkeypatch.setattr("kv_transfer.prefix.fetcher.MIN_TIMEOUT_S", 5.0)
    monkeypatch.setattr("kv_transfer.prefix.stores.QUERY_TIMEOUT_S", 5.0)
    generator = random.Random(3)
    families = prompts_of(NUM_FAMILIES, (5, 300), seed=4)
    num_tokens: Counter[int] = Counter()
    async with (
        small_mesh(checkpoint, TransferConfig(data_plane=plane), redis_url) as mesh,
        running_store(
            redis, num_blocks=3_000, plane=plane, layout=mesh.decode.layout.full
        ) as store,
        open_channel(mesh.gateway.grpc_address) as channel,
    ):
        client = Client(InferenceStub(channel))
        turns = asyncio.Semaphore(24)

        def held() -> list[object]:
            return [each for each in (mesh.held(), *store.held) if each]

        async def leave_early(prompt: list[int]) -> None:
            async with turns:
                got = 0
                try:
                    async with asyncio.timeout(generator.uniform(0.0, 0.3)):
                        async for _ in client.ask(prompt, max_tokens=100):
                            got += 1
                except TimeoutError:
                    pass
                num_tokens[min(got, 2)] += 1

        prompts = [
            [*families[index % NUM_FAMILIES], generator.randrange(3, VOCAB_SIZE)]
            for index in range(NUM_ABORTS)
        ]
        await asyncio.gather(*(leave_early(prompt) for prompt in prompts))
        await until_free(held, FREE_WITHIN_S)
        ended = mesh.decode.receiver.counters.ended_leases
        num_fetched_blocks = store.servicer.num_fetched_blocks
        store.blocks.shelf.check_conservation()
        # What is in pools and store now is what it says it is.
        answers = [[each async for each in client.ask(prompt)] for prompt in prompts[:10]]
        await until_free(held, FREE_WITHIN_S)
    assert answers == answers_of_one_engine(checkpoint, prompts[:10])
    assert "expired" not in ended
    assert ended["committed"] > 0
    assert ended["aborted"] > 0
    assert num_fetched_blocks > 0, "the store had no part in it"
    # They left before the first token, right after it, and later.
    assert all(num_tokens[n] > 0 for n in range(3)), num_tokens
