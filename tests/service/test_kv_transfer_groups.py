"""Workers of any layout hand over to workers of any other: every byte, once, and nothing else."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

from engine.errors import LayoutMismatchError, PeerUnavailableError, RankDeadError
from engine.kv_cache.layout import KvLayout
from kv_transfer.group_layout import GroupLayout
from kv_transfer.handover import TokenShard
from kv_transfer.offer import RankOffer
from kv_transfer.plane import WritePermit, WriteWindow
from kv_transfer.receiving_rank import ReceivingRank
from kv_transfer.reshard import num_handover_bytes
from kv_transfer.sending_rank import RankLink, SendingRank, Target, Written
from kv_transfer.slot_ranges import SlotRange
from tests.fakes.kv_groups import NUM_BLOCKS, Bytes, KvGroups, kv_groups
from tests.fakes.kv_layouts import group_layout
from tests.service.test_kv_transfer_handover import until

NUM_TOKENS = 21

GQA = KvLayout(num_layers=6, num_kv_heads=4, head_dim=8, block_size_tokens=4, dtype="bfloat16")
UNEVEN = replace(GQA, num_layers=5, num_kv_heads=3, dtype="int8")
LATENT = replace(GQA, num_layers=7, num_kv_heads=1, num_parts=1, dtype="float32", head_dim=6)
MODELS = {"gqa": (GQA, 8), "uneven": (UNEVEN, 9), "latent": (LATENT, 8)}

SENDERS: dict[str, dict[str, int]] = {
    "1": {},
    "tp2": {"tp": 2},
    "tp3": {"tp": 3},
    "tp8": {"tp": 8},
    "pp2": {"pp": 2},
    "tp2pp2": {"tp": 2, "pp": 2},
    "tp2sp2": {"tp": 2, "sp": 2},
    "pp2x2": {"pp": 2, "chunks": 2},
}
RECEIVERS: dict[str, dict[str, int]] = {
    "1": {},
    "tp3": {"tp": 3},
    "tp4": {"tp": 4},
    "pp3": {"pp": 3},
    "tp2pp2": {"tp": 2, "pp": 2},
}
PAIRS = [
    pytest.param(model, sender, receiver, id=f"{model}-{sender}-to-{receiver}")
    for model in MODELS
    for sender in SENDERS
    for receiver in RECEIVERS
]


def test_there_are_enough_pairs() -> None:
    assert len(PAIRS) >= 60


def layouts_of(
    model: str, sender: str, receiver: str, *, receiver_block_tokens: int = 4
) -> tuple[GroupLayout, GroupLayout]:
    full, num_query_heads = MODELS[model]
    other = replace(full, block_size_tokens=receiver_block_tokens)
    return (
        group_layout(full, num_query_heads=num_query_heads, **SENDERS[sender]),
        group_layout(other, num_query_heads=num_query_heads, **RECEIVERS[receiver]),
    )


def a_sequence(full: KvLayout) -> Bytes:
    shape = (NUM_TOKENS, full.num_layers, full.num_parts, full.num_kv_heads)
    num_bytes = full.bytes_per_cell // full.num_parts
    return np.random.default_rng(7).integers(0, 256, (*shape, num_bytes), dtype=np.uint8)


def zigzag(first_token: int, end_token: int, num_shards: int) -> list[TokenShard]:
    """Shards there and back, so that a causal triangle is shared evenly."""
    order = [*range(num_shards), *reversed(range(num_shards))]
    width = end_token - first_token
    borders = [first_token + width * index // len(order) for index in range(len(order) + 1)]
    return [
        TokenShard(borders[index], borders[index + 1], shard)
        for index, shard in enumerate(order)
        if borders[index] < borders[index + 1]
    ]


@pytest.mark.parametrize(("model", "sender", "receiver"), PAIRS)
async def test_every_rank_gets_its_heads_of_its_layers_and_nothing_else(
    model: str, sender: str, receiver: str
) -> None:
    case = sum(map(ord, model + sender + receiver))
    plane = ("shm", "tcp")[case % 2]
    sizes = {"receiver_block_tokens": (4, 3, 6)[case % 3]}
    layouts = layouts_of(model, sender, receiver, **sizes)
    async with kv_groups(*layouts, plane=plane) as groups:
        num_shards = layouts[0].num_token_shards
        sequence = a_sequence(layouts[0].full)
        block_ids = [9, 2, 7, 4, 0, 11]
        pushes = [(0, 9), (9, 8), (17, 4)]
        shards = [zigzag(first, first + count, num_shards) for first, count in pushes]
        groups.hold(sequence, block_ids, [shard for push in shards for shard in push])
        before = [memory.blocks().copy() for memory in groups.remote]
        async with groups.sender.handover(
            "r", decode_address=groups.address, num_tokens=NUM_TOKENS
        ) as handover:
            for (first_token, count), push_shards in zip(pushes, shards, strict=True):
                more = push_shards if num_shards > 1 else ()
                await handover.push(block_ids, first_token, count, shards=more)
            await handover.commit(5)
        assert groups.engine.committed == [("r", 5)]
        assert handover.report.num_bytes == num_handover_bytes(layouts[1], NUM_TOKENS)
        assert handover.report.data_plane == plane
        for rank, box in enumerate(layouts[1].boxes):
            expected = sequence[:, box.layers][:, :, :, box.kv_heads]
            np.testing.assert_array_equal(
                groups.arrived(rank, handover.block_ids, NUM_TOKENS), expected
            )
            assert_only(groups, rank, before[rank], handover.block_ids)
        counters = groups.receiver.counters
        assert counters.num_committed_bytes == handover.report.num_bytes
        assert counters.dropped_connections == {}


def assert_only(groups: KvGroups, rank: int, before: Bytes, block_ids: Sequence[int]) -> None:
    """Blocks of others, and the slots after the last token, are what they were."""
    after = groups.remote[rank].blocks().copy()
    size = groups.remote[rank].layout.block_size_tokens
    for index, block_id in enumerate(block_ids):
        num_slots = min(size, NUM_TOKENS - index * size)
        after[block_id, :, :, :, :num_slots] = before[block_id, :, :, :, :num_slots]
    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("plane", ["shm", "tcp"])
@pytest.mark.parametrize(("sender", "receiver"), [("tp2pp2", "tp3"), ("pp2x2", "pp3")])
async def test_each_rank_sends_each_layer_when_it_has_it_whatever_others_have(
    sender: str, receiver: str, plane: str
) -> None:
    layouts = layouts_of("gqa", sender, receiver)
    async with kv_groups(*layouts, plane=plane) as groups:
        sequence = a_sequence(GQA)
        block_ids = [9, 2, 7, 4, 0, 11]
        groups.hold(sequence, block_ids, [TokenShard(0, NUM_TOKENS, 0)])
        computed = [memory.blocks().copy() for memory in groups.local]
        for memory in groups.local:
            memory.rows()[:] = 0  # what leaves too early is wrong
        async with groups.sender.handover(
            "r", decode_address=groups.address, num_tokens=NUM_TOKENS
        ) as handover:

            def has_arrived(layer: int, heads: tuple[int, ...]) -> bool:
                for rank, box in enumerate(layouts[1].boxes):
                    if layer in box.layers:
                        there = groups.arrived(rank, handover.block_ids, NUM_TOKENS)
                        for head in set(heads) & set(box.kv_heads):
                            cell = there[:, box.layers.index(layer), :, box.kv_heads.index(head)]
                            if not np.array_equal(cell, sequence[:, layer, :, head]):
                                return False
                return True

            pushing = asyncio.ensure_future(handover.push(block_ids, 0, NUM_TOKENS, step=1))
            # The last stage's last rank first: no rank waits for another.
            for rank, box in reversed([*enumerate(layouts[0].boxes)]):
                memory = groups.local[rank]
                memory.progress.begin(1)
                for place, layer in enumerate(box.layers):
                    assert not pushing.done()
                    memory.blocks()[:, place] = computed[rank][:, place]
                    memory.progress.reach(place + 1)
                    await until(partial(has_arrived, layer, box.kv_heads))
            await pushing
            await handover.commit(5)
        assert handover.report.num_bytes == num_handover_bytes(layouts[1], NUM_TOKENS)


@pytest.mark.parametrize("plane", ["shm", "tcp"])
@pytest.mark.parametrize(("data_shard", "receiver_shard"), [(0, 0), (1, 0), (0, 2), (1, 1)])
async def test_a_sequence_goes_from_its_data_shard_to_the_one_that_has_its_blocks(
    data_shard: int, receiver_shard: int, plane: str
) -> None:
    sender = group_layout(GQA, tp=2, sp=2, dp=2)
    receiver = group_layout(replace(GQA, block_size_tokens=6), tp=3, dp=3)
    async with kv_groups(sender, receiver, plane=plane, receiver_shard=receiver_shard) as groups:
        sequence = a_sequence(GQA)
        block_ids = [9, 2, 7, 4, 0, 11]
        shards = zigzag(0, NUM_TOKENS, 2)
        groups.hold(sequence, block_ids, shards, data_shard=data_shard)
        before = [memory.blocks().copy() for memory in groups.remote]
        async with groups.sender.handover(
            "r", decode_address=groups.address, num_tokens=NUM_TOKENS
        ) as handover:
            announced = [data_shard * NUM_BLOCKS + block_id for block_id in block_ids]
            await handover.push(announced, 0, NUM_TOKENS, shards=shards)
            await handover.commit(5)
        assert handover.report.num_bytes == num_handover_bytes(receiver, NUM_TOKENS)
        assert num_handover_bytes(receiver, 1) == num_handover_bytes(receiver.one_shard, 1)
        in_pool = [block_id - receiver_shard * NUM_BLOCKS for block_id in handover.block_ids]
        for rank, box in enumerate(receiver.boxes):
            if box.data_shard != receiver_shard:
                np.testing.assert_array_equal(groups.remote[rank].blocks(), before[rank])
                continue
            expected = sequence[:, box.layers][:, :, :, box.kv_heads]
            np.testing.assert_array_equal(groups.arrived(rank, in_pool, NUM_TOKENS), expected)
            assert_only(groups, rank, before[rank], in_pool)


async def test_blocks_of_two_data_shards_are_no_sequence() -> None:
    layouts = group_layout(GQA, dp=2), group_layout(GQA)
    async with kv_groups(*layouts) as groups:
        opened = await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)
        with pytest.raises(ValueError, match=r"data shards \[0, 1\]"):
            await opened.push([0, 1, NUM_BLOCKS], 0, 9)


async def test_the_receivers_block_size_names_the_prefix() -> None:
    layouts = layouts_of("gqa", "tp2", "tp3", receiver_block_tokens=6)
    asked: list[int] = []

    def hash_blocks(block_size_tokens: int) -> Sequence[bytes]:
        asked.append(block_size_tokens)
        return [bytes([index]) * 32 for index in range(NUM_TOKENS // block_size_tokens)]

    async with kv_groups(*layouts) as groups:
        opened = await groups.sender.open(
            "r", decode_address=groups.address, num_tokens=NUM_TOKENS, hash_blocks=hash_blocks
        )
        assert asked == [6]
        assert len(opened.block_ids) == 4


@pytest.mark.parametrize(
    "shards",
    [
        (),
        (TokenShard(0, 5, 0),),
        (TokenShard(1, 9, 0),),
        (TokenShard(0, 5, 0), TokenShard(6, 9, 1)),
        (TokenShard(0, 5, 0), TokenShard(4, 9, 1)),
        (TokenShard(0, 5, 0), TokenShard(5, 9, 2)),
        (TokenShard(0, 9, 0), TokenShard(9, 9, 1)),
    ],
    ids=str,
)
async def test_split_tokens_must_be_said_to_be_whose(shards: Sequence[TokenShard]) -> None:
    async with kv_groups(*layouts_of("gqa", "tp2sp2", "1")) as groups:
        opened = await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)
        with pytest.raises(ValueError, match=r"tokens \[0, 9\) of 2 shards"):
            await opened.push([0, 1, 2], 0, 9, shards=shards)
        await opened.push([0, 1, 2], 0, 9, shards=zigzag(0, 9, 2))


async def test_groups_of_other_models_are_refused_with_both_sides_named() -> None:
    sender = group_layout(GQA, tp=2)
    receiver = group_layout(replace(GQA, num_kv_heads=2), tp=2)
    async with kv_groups(sender, receiver) as groups:
        with pytest.raises(
            LayoutMismatchError, match=r"prefill-0 has .*num_kv_heads=4.* but decode-0 .*=2"
        ):
            await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)


# One of several ranks fails.


class FailingReceivingRank:
    """Passes on, until a method is named to fail; the first fences of a lease may be slow."""

    def __init__(self, rank: ReceivingRank) -> None:
        self.rank = rank
        self.dead_in: set[str] = set()
        self.may_fence = asyncio.Event()
        self.may_fence.set()
        self.fenced: list[int] = []

    @property
    def dropped(self) -> dict[str, int]:
        return dict(self.rank.dropped)

    async def start(self, epoch: int) -> RankOffer:
        return await self.rank.start(epoch)

    async def open(self, window: WriteWindow) -> None:
        self._check("open")
        await self.rank.open(window)

    async def fence(self, lease_id: int) -> None:
        self._check("fence")
        await self.may_fence.wait()
        await self.rank.fence(lease_id)
        self.fenced.append(lease_id)

    async def forget(self, lease_ids: Sequence[int]) -> None:
        await self.rank.forget(lease_ids)

    async def stop(self) -> None:
        await self.rank.stop()

    def _check(self, name: str) -> None:
        if name in self.dead_in:
            raise RankDeadError("rank 1 of decode-0 is gone", rank=1)


async def complete(groups: KvGroups, request_id: str) -> None:
    async with groups.sender.handover(
        request_id, decode_address=groups.address, num_tokens=NUM_TOKENS
    ) as handover:
        await handover.push([0, 1, 2, 3, 4, 5], 0, NUM_TOKENS)
        await handover.commit(1)


async def test_blocks_come_back_only_when_every_rank_has_fenced() -> None:
    failing: list[FailingReceivingRank] = []

    def receiving(rank: int, local: ReceivingRank) -> ReceivingRank:
        if rank != 1:
            return local
        failing.append(FailingReceivingRank(local))
        return failing[0]

    async with kv_groups(*layouts_of("gqa", "tp2", "tp4"), receiving=receiving) as groups:
        total = groups.engine.stats.num_free_blocks
        opened = await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)
        failing[0].may_fence.clear()
        aborting = asyncio.ensure_future(groups.receiver.abort("r"))
        await asyncio.wait([aborting], timeout=0.05)
        assert not aborting.done()
        assert groups.engine.stats.num_free_blocks < total
        assert groups.receiver.counters.num_quarantined_leases == 1
        failing[0].may_fence.set()
        assert await aborting == len(opened.block_ids)
        assert groups.engine.stats.num_free_blocks == total
        assert len(failing[0].fenced) == 1


@pytest.mark.parametrize("method", ["open", "fence"])
async def test_a_dead_receiving_rank_fails_the_handover_by_name(method: str) -> None:
    failing: list[FailingReceivingRank] = []

    def receiving(rank: int, local: ReceivingRank) -> ReceivingRank:
        failing.append(FailingReceivingRank(local))
        return failing[-1]

    async with kv_groups(*layouts_of("gqa", "tp2", "tp3"), receiving=receiving) as groups:
        failing[1].dead_in = {method}
        with pytest.raises(Exception, match="rank 1 of decode-0 is gone"):
            await complete(groups, "r")
        assert groups.engine.committed == []
        assert groups.receiver.counters.num_live_leases == 0
        failing[1].dead_in = set()
        if method == "open":  # the other ranks could fence: nothing is left behind
            await complete(groups, "r")


class DyingLink:
    """The process behind a link dies in its second push."""

    def __init__(self, link: RankLink) -> None:
        self.link = link
        self.data_planes, self.fallback_reasons = link.data_planes, link.fallback_reasons
        self.num_pushes = 0

    def write(
        self, permit: WritePermit, parts: Sequence[SlotRange], step: int | None = None
    ) -> asyncio.Future[Written]:
        self.num_pushes += 1
        if self.num_pushes < 2:
            return self.link.write(permit, parts, step)
        failed = asyncio.get_running_loop().create_future()
        failed.set_exception(RankDeadError("rank 1 of prefill-0 is gone", rank=1))
        return failed

    def close(self) -> None:
        self.link.close()


class DyingSendingRank:
    def __init__(self, rank: SendingRank) -> None:
        self.rank = rank

    async def open_link(self, targets: Sequence[Target]) -> RankLink:
        return DyingLink(await self.rank.open_link(targets))


@pytest.mark.parametrize("plane", ["shm", "tcp"])
async def test_a_dead_sending_rank_fails_the_handover_and_frees_its_blocks(plane: str) -> None:
    def sending(rank: int, local: SendingRank) -> SendingRank:
        return DyingSendingRank(local) if rank == 1 else local

    layouts = layouts_of("gqa", "tp2", "tp4")
    async with kv_groups(*layouts, plane=plane, sending=sending) as groups:
        total = groups.engine.stats.num_free_blocks
        handover = await groups.sender.open(
            "r", decode_address=groups.address, num_tokens=NUM_TOKENS
        )
        await handover.push([0, 1, 2, 3, 4, 5], 0, 9)
        with pytest.raises(RankDeadError, match="rank 1 of prefill-0") as failure:
            await handover.push([0, 1, 2, 3, 4, 5], 9, 12)
        handover.fail(failure.value)
        await groups.sender.close(handover)
        assert handover.report.outcome == "RankDeadError"
        assert groups.engine.stats.num_free_blocks == total
        assert groups.receiver.counters.ended_leases == {"released": 1}
        assert groups.engine.committed == []


async def test_links_are_closed_when_one_of_them_cannot_be_opened() -> None:
    opened = Counter[str]()

    class CountedLink(DyingLink):
        def close(self) -> None:
            opened["closed"] += 1
            super().close()

    class CountedRank(DyingSendingRank):
        async def open_link(self, targets: Sequence[Target]) -> RankLink:
            link = CountedLink(await self.rank.open_link(targets))
            opened["opened"] += 1
            return link

    class UnreachableRank(DyingSendingRank):
        async def open_link(self, targets: Sequence[Target]) -> RankLink:
            while opened["opened"] < 2:  # noqa: ASYNC110 - the others come first
                await asyncio.sleep(0.001)
            raise PeerUnavailableError("no way")

    def sending(rank: int, local: SendingRank) -> SendingRank:
        return UnreachableRank(local) if rank == 2 else CountedRank(local)

    async with kv_groups(*layouts_of("gqa", "tp3", "1"), sending=sending) as groups:
        with pytest.raises(PeerUnavailableError, match="no way"):
            await groups.sender.open("r", decode_address=groups.address, num_tokens=NUM_TOKENS)
        assert opened == {"opened": 2, "closed": 2}
