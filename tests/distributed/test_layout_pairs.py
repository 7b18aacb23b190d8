"""Any layout hands over to any other: real engines draw the tokens that one rank draws alone.

Layers leave as they are computed. What leaves too early is not a number, and followers are slow.
"""

import asyncio
import multiprocessing
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.parallel import ParallelLayout, RankGroup
from engine.request import Request
from engine.runtime import kv_news, runner
from engine.runtime.build import ModelEngine, build_follower
from engine.runtime.commands import SequenceMode, TokenEvent
from engine.runtime.engine_thread import EngineThread
from engine.runtime.membership import Membership, pool_addresses
from engine.scheduling.step_plan import StepPlan
from kv_transfer.config import TransferConfig
from kv_transfer.local_receiving_rank import LocalReceivingRank
from kv_transfer.local_sending_rank import LocalSendingRank
from kv_transfer.rank.worker import kv_layout_of, other_ranks, serve_follower
from kv_transfer.receiver import KvReceiver
from kv_transfer.receiving_group import ReceivingGroup
from kv_transfer.sender import KvSender
from kv_transfer.sending_group import SendingGroup
from mesh.channel import open_channel
from prefill_worker.prefill import Prefiller, PrefillJob
from tests.checkpoints import VOCAB_SIZE, tiny_checkpoint
from tests.distributed.group_engine import (
    ENGINE,
    Answers,
    answer_all,
    cores_of_test,
    lead,
    member,
    request_of,
)
from tests.distributed.ranks import RankProcesses
from tests.fakes.kv_pair import serving

NUM_TOKENS = 8
LENGTHS = (1, 16, 45, 130)
TIMEOUT_S = 120.0
DIGEST = "the same on both sides"
TRANSFER = TransferConfig(rpc_timeout_s=30.0, lease_s=30.0, reserve_timeout_s=60.0)
"""A host with many more ranks than cores is slow to answer."""
SENDER = {"has_prefix_cache": False, "block_size_tokens": 16}
RECEIVER = {"has_prefix_cache": False, "block_size_tokens": 8}
"""Without prefix caches, so that no pair lives on what another has sent."""


@dataclass(frozen=True, slots=True)
class Case:
    family: str
    form: dict[str, Any]
    senders: tuple[str, ...]
    receivers: tuple[str, ...]


CASES = {
    "dense": Case(
        "llama",
        {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 5},
        ("tp=1", "tp=3", "tp=2,sp=2", "pp=2,interleave=2"),
        ("tp=1", "tp=2", "tp=4", "pp=3"),
    ),
    "uneven": Case(
        "qwen2",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "head_dim": 8,
         "num_hidden_layers": 4},
        ("tp=1", "tp=2", "tp=4", "sp=3"),
        ("tp=1", "tp=3", "pp=2", "tp=2,pp=2"),
    ),
    "latent": Case(
        "deepseek_v2",
        {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
         "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
         "v_head_dim": 16, "head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_shared_experts": 1, "moe_intermediate_size": 32, "first_k_dense_replace": 1,
         "n_group": 1, "topk_group": 1, "topk_method": "greedy"},
        ("tp=1", "tp=2,ep=2", "pp=3", "sp=2,pp=2"),
        ("tp=1", "tp=3", "pp=2,tp=2", "dp=2,ep=2"),
    ),
    "mixture": Case(
        "qwen2_moe",
        {"num_hidden_layers": 4, "num_experts": 6, "num_experts_per_tok": 2,
         "moe_intermediate_size": 40, "shared_expert_intermediate_size": 56},
        ("tp=1", "dp=3,ep=3", "tp=2,ep=2", "pp=2,sp=2"),
        ("tp=2", "dp=2,ep=2", "pp=2", "tp=2,dp=2,ep=4"),
    ),
}  # fmt: skip


def test_there_are_enough_pairs() -> None:
    assert sum(len(case.senders) * len(case.receivers) for case in CASES.values()) >= 60


def prompts() -> list[list[int]]:
    draw = random.Random(11)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in LENGTHS]


watched: list[bool] = []
"""By step of this process, whether its layers were waited for."""


def step_by_layers(*, is_slow: bool) -> None:
    """Have this process tell of each layer, and spoil the slots of each step before it begins."""
    kv_news.NEWS_BYTES = 1
    run = runner.ModelRunner.run

    def spoil_and_run(
        self: runner.ModelRunner, plans: Sequence[StepPlan], *arguments: Any, **named: Any
    ) -> torch.Tensor:
        size = self.pool.layout.block_size_tokens
        for chunk in (chunk for plan in plans for chunk in plan.chunks):
            first = chunk.first_position
            for position in range(first, first + len(chunk.token_ids)):
                index, slot = divmod(position, size)
                self.pool.blocks_PLJGCA[chunk.block_ids[index], :, :, :, slot] = torch.nan
        watched.append(named["is_watched"])
        if is_slow:
            time.sleep(0.005)  # a write that does not wait goes by now
        return run(self, plans, *arguments, **named)

    runner.ModelRunner.run = spoil_and_run  # type: ignore[method-assign]


def lent(membership: Membership, path: str, settings: dict[str, Any]) -> None:
    """What every rank but 0 does: compute, and let rank 0 use the pool."""
    config = EngineConfig(**{**ENGINE, **settings})
    follower = build_follower(Path(path), config, membership=membership, cores=cores_of_test())
    host = "127.0.0.1"
    asyncio.run(serve_follower(follower, TRANSFER, host=host, reachable_host=host))


def _settings(layout: str, settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "parallel": ParallelLayout.parse(layout)}


def _name(receiver: str, sender: str, index: int) -> str:
    return f"{sender} to {receiver}: {LENGTHS[index]} tokens"


def _request(receiver: str, sender: str, index: int) -> Request:
    request = request_of(index, prompts()[index], NUM_TOKENS)
    return replace(request, request_id=_name(receiver, sender, index))


def send(
    group: RankGroup, path: str, name: str, receivers: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    """A prefill worker: every prompt for every receiver, by name its (worker id, address)."""
    membership = member(group)
    step_by_layers(is_slow=membership.leader is not None)
    settings = _settings(name, SENDER)
    if membership.leader is not None:
        lent(membership, path, settings)
        return {}
    return asyncio.run(_send(lead(membership, Path(path), settings), membership, name, receivers))


async def _send(
    engine: ModelEngine, membership: Membership, name: str, receivers: dict[str, tuple[str, str]]
) -> dict[str, Any]:
    addresses = await asyncio.to_thread(pool_addresses, membership)
    found: dict[str, Any] = {}
    async with (
        EngineThread(engine) as thread,
        other_ranks(addresses, TRANSFER, worker_id=name) as others,
        KvSender(
            SendingGroup(
                kv_layout_of(engine),
                engine.limits.num_blocks,
                (LocalSendingRank(engine.kv_pool, TRANSFER), *others),
            ),
            sender_id=name,
            model_digest=DIGEST,
            open_channel=open_channel,
            config=TRANSFER,
        ) as sender,
    ):
        prefiller = Prefiller(thread, sender, hash_salt_of=lambda _: 0)

        async def hand_over(receiver: str, worker_id: str, address: str, index: int) -> None:
            request = _request(receiver, name, index)
            first: list[int] = []

            async def emit(token: TokenEvent) -> None:
                first.append(token.token_id)

            job = PrefillJob(request=request, decode_worker_id=worker_id, decode_address=address)
            report = await prefiller.run(job, emit)
            assert report is not None
            found[request.request_id] = [first, report.num_bytes]

        async with asyncio.TaskGroup() as tasks:
            for receiver, (worker_id, address) in receivers.items():
                for index in range(len(LENGTHS)):
                    tasks.create_task(hand_over(receiver, worker_id, address, index))
        assert thread.stats.num_free_blocks == thread.stats.num_blocks
    assert any(watched)
    return found


def receive(
    group: RankGroup, path: str, name: str, senders: Sequence[str], told: Connection
) -> dict[str, Any]:
    """A decode worker: tells its address, and answers what each sender brings."""
    membership = member(group)
    settings = _settings(name, RECEIVER)
    if membership.leader is not None:
        lent(membership, path, settings)
        return {}
    return asyncio.run(
        _receive(lead(membership, Path(path), settings), membership, name, senders, told)
    )


async def _receive(
    engine: ModelEngine, membership: Membership, name: str, senders: Sequence[str], told: Connection
) -> dict[str, Any]:
    addresses = await asyncio.to_thread(pool_addresses, membership)
    layout = kv_layout_of(engine)
    async with (
        EngineThread(engine) as thread,
        other_ranks(addresses, TRANSFER, worker_id=name) as others,
        KvReceiver(
            thread,
            ReceivingGroup(
                layout,
                engine.limits.num_blocks,
                (LocalReceivingRank(engine.kv_pool, TRANSFER), *others),
            ),
            receiver_id=name,
            model_digest=DIGEST,
            config=TRANSFER,
            shares_prefixes=False,
        ) as receiver,
        serving(receiver) as address,
    ):
        answers = Answers(len(senders) * len(LENGTHS))
        for sender in senders:
            for index in range(len(LENGTHS)):
                thread.submit(_request(name, sender, index), SequenceMode.DECODE, answers)
        told.send_bytes(address.encode())
        await answers.done.wait()
        assert not answers.errors, answers.errors
        stats = thread.stats
        assert stats.num_free_blocks == stats.num_blocks
    boxes = [layout.boxes[rank] for rank in layout.shard_ranks(0)]
    cells = sum(len(box.layers) * len(box.kv_heads) for box in boxes)
    return {
        "tokens": answers.tokens,
        "bytes_per_token": cells * layout.full.bytes_per_cell,
        "num_prefill_tokens": stats.num_prefill_tokens,
    }


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.timeout(2 * TIMEOUT_S)
def test_every_prefill_layout_hands_over_to_every_decode_layout(case: Case, tmp_path: Path) -> None:
    path = tiny_checkpoint(tmp_path, case.family, **case.form)
    alone = asyncio.run(answer_all(lead(None, path, {}), prompts(), NUM_TOKENS)).tokens
    with ExitStack() as stack:
        decode: dict[str, RankProcesses] = {}
        addresses: dict[str, tuple[str, str]] = {}
        pipes = {}
        for name in case.receivers:
            pipes[name], told = multiprocessing.Pipe(duplex=False)
            arguments = (str(path), name, case.senders, told)
            decode[name] = stack.enter_context(RankProcesses(name, receive, *arguments))
            told.close()
        for name, pipe in pipes.items():
            assert pipe.poll(TIMEOUT_S), decode[name].results([0], timeout_s=0)
            addresses[name] = (name, pipe.recv_bytes().decode())
        prefill = {
            name: stack.enter_context(RankProcesses(name, send, str(path), name, addresses))
            for name in case.senders
        }
        sent = {name: ranks.results([0], timeout_s=TIMEOUT_S)[0] for name, ranks in prefill.items()}
        received = {
            name: ranks.results([0], timeout_s=TIMEOUT_S)[0] for name, ranks in decode.items()
        }
        for ranks in (*prefill.values(), *decode.values()):
            ranks.results(timeout_s=TIMEOUT_S)  # the others came to an orderly end, too
    for receiver, decoded in received.items():
        assert decoded["num_prefill_tokens"] == 0
        for sender, handed in sent.items():
            for index, length in enumerate(LENGTHS):
                name = _name(receiver, sender, index)
                first, num_bytes = handed[name]
                assert first + decoded["tokens"][name] == alone[f"r{index}"], name
                assert num_bytes == length * decoded["bytes_per_token"], name
