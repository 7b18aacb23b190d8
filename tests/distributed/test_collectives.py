"""Every way of talking gives what plain torch gives on the tensors of all ranks together."""

import random
from typing import Any

import pytest
import torch

from engine.parallel import Axis, CollectivesConfig, RankGroup
from tests.distributed.ranks import run_ranks

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64)


def tensor_of(rank: int, call: int, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """What a rank hands to a call: any rank can make it again."""
    generator = torch.Generator().manual_seed(1000 * call + rank)
    return (torch.randn(shape, generator=generator) * 8).to(dtype)


def random_shape(draw: random.Random) -> list[int]:
    num_dims = draw.randint(1, 3)
    most = draw.choice((1, 3, {1: 90_000, 2: 300, 3: 45}[num_dims]))
    return [draw.randint(0 if draw.random() < 0.1 else 1, most) for _ in range(num_dims)]


def summed(parts: list[torch.Tensor]) -> torch.Tensor:
    """In rank order, in float32 at least, rounded once."""
    dtype = parts[0].dtype
    wide = torch.float32 if dtype in {torch.float16, torch.bfloat16} else dtype
    total = parts[0].to(wide)
    for part in parts[1:]:
        total = total + part.to(wide)
    return total.to(dtype)


def make_random_calls(group: RankGroup, seed: int, num_calls: int) -> list[str]:
    axis = group.axes.tp
    draw = random.Random(seed)
    made = []
    for call in range(num_calls):
        dtype = draw.choice(DTYPES)
        shape = random_shape(draw)
        operation = draw.choice(
            (
                *("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"),
                *("ring", "shift"),
            )
        )
        made.append(f"call {call}: {operation} {dtype} {shape}")
        dim = draw.randrange(len(shape))
        sizes = [draw.choice((0, 1, 2, 7, 33)) for _ in range(axis.size)]
        if operation == "all_reduce":
            parts = [tensor_of(r, call, shape, dtype) for r in range(axis.size)]
            found, expected = axis.all_reduce(parts[axis.rank].clone()), summed(parts)
        elif operation == "all_gather":
            shapes = [[*shape[:dim], size, *shape[dim + 1 :]] for size in sizes]
            parts = [tensor_of(r, call, shapes[r], dtype) for r in range(axis.size)]
            found = axis.all_gather(parts[axis.rank], dim, sizes)
            expected = torch.cat(parts, dim)
        elif operation == "reduce_scatter":
            whole = [*shape[:dim], sum(sizes), *shape[dim + 1 :]]
            parts = [tensor_of(r, call, whole, dtype) for r in range(axis.size)]
            found = axis.reduce_scatter(parts[axis.rank], dim, sizes)
            expected = summed(parts).split(sizes, dim)[axis.rank]
        elif operation == "all_to_all":
            counts = [
                [draw.choice((0, 0, 1, 5, 40)) for _ in range(axis.size)] for _ in range(axis.size)
            ]
            parts = [
                tensor_of(r, call, [sum(counts[r]), *shape[1:]], dtype) for r in range(axis.size)
            ]
            receives = [counts[r][axis.rank] for r in range(axis.size)]
            found = axis.all_to_all(parts[axis.rank], counts[axis.rank], receives)
            expected = torch.cat([parts[r].split(counts[r])[axis.rank] for r in range(axis.size)])
        elif operation == "broadcast":
            source = draw.randrange(axis.size)
            found = axis.broadcast(tensor_of(axis.rank, call, shape, dtype), source)
            expected = tensor_of(source, call, shape, dtype)
        elif operation == "shift":
            if axis.size == 1:
                continue
            before = (axis.rank - 1) % axis.size
            parts = [tensor_of(r, call, [sizes[r], *shape[1:]], dtype) for r in range(axis.size)]
            found = axis.begin_shift(parts[axis.rank], sizes[before])()
            expected = parts[before]
        else:
            before, after = (axis.rank - 1) % axis.size, (axis.rank + 1) % axis.size
            mine = tensor_of(axis.rank, call, shape, dtype)
            found, expected = torch.empty_like(mine), tensor_of(before, call, shape, dtype)
            if axis.size == 1:
                continue
            if axis.rank == 0:
                axis.send(mine, after)
                axis.receive(found, before)
            else:
                axis.receive(found, before)
                axis.send(mine, after)
        if group.transports.get(Axis.TP) == "shm" or operation == "all_reduce":
            assert torch.equal(found, expected), made[-1]
        torch.testing.assert_close(
            found,
            expected,
            rtol=1e-5 if dtype == torch.float32 else None,
            atol=None if dtype != torch.float32 else 1e-4,
            msg=lambda text: f"{made[-1]}: {text}",
        )
    return made


SMALL = CollectivesConfig(collective_buffer_bytes=64 * 1024, mailbox_bytes=64 * 1024)
TCP = CollectivesConfig(has_shared_memory=False)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("config", [pytest.param(SMALL, id="shm"), pytest.param(TCP, id="gloo")])
def test_random_calls_give_what_torch_gives(num_ranks: int, config: CollectivesConfig) -> None:
    made = run_ranks(num_ranks, make_random_calls, num_ranks, 60, config=config)
    assert all(calls == made[0] for calls in made)


def sum_two_at_once(group: RankGroup, num_items: int) -> list[float]:
    axis = group.axes.tp
    x, y = (torch.full((num_items,), float(10**power * (axis.rank + 1))) for power in (0, 1))
    first, second = axis.begin_all_reduce(x), axis.begin_all_reduce(y)
    third = axis.all_gather(torch.tensor([float(axis.rank)]))
    totals = [first(), second()]
    assert all(bool((total == total[0]).all()) for total in totals)
    return [*(float(total[0]) for total in totals), *third.tolist()]


@pytest.mark.parametrize("config", [pytest.param(SMALL, id="shm"), pytest.param(TCP, id="gloo")])
@pytest.mark.parametrize("num_items", [3, 1_000_000])
def test_sums_that_began_together_do_not_mix(num_items: int, config: CollectivesConfig) -> None:
    found = run_ranks(3, sum_two_at_once, num_items, config=config)
    assert found == [[6.0, 60.0, 0.0, 1.0, 2.0]] * 3


def send_both_ways_first(group: RankGroup, num_messages: int, num_items: int) -> list[float]:
    """Every rank sends all before it receives any, more than lies between two ranks."""
    axis = group.axes.tp
    after, before = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
    for index in range(num_messages):
        axis.send(torch.full((num_items,), float(10 * axis.rank + index)), after)
    found = [torch.empty(num_items) for _ in range(num_messages)]
    for x in found:
        axis.receive(x, before)
    assert all(bool((x == x[0]).all()) for x in found)
    axis.barrier()
    return [float(x[0]) for x in found]


@pytest.mark.parametrize("config", [pytest.param(SMALL, id="shm"), pytest.param(TCP, id="gloo")])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_send_does_not_wait_for_its_receiver(num_ranks: int, config: CollectivesConfig) -> None:
    found = run_ranks(num_ranks, send_both_ways_first, 3, 200_000, config=config)
    expected = [[10.0 * ((r - 1) % num_ranks) + i for i in range(3)] for r in range(num_ranks)]
    assert found == expected


def send_and_leave(group: RankGroup) -> float:
    """Rank 0 is gone before rank 1 has room for all of it."""
    x = torch.full((100_000,), 7.0)
    if group.rank == 0:
        group.axes.tp.send(x, 1)
        return 7.0
    return float(group.axes.tp.receive(torch.empty_like(x), 0).mean())


def test_what_was_sent_comes_though_the_sender_leaves() -> None:
    assert run_ranks(2, send_and_leave, config=SMALL) == [7.0, 7.0]


def bytes_of_the_probe(group: RankGroup) -> int:
    collectives: Any = group.axes.tp.collectives
    links = collectives._links._links.values()
    before: int = sum(link.num_to_send for link in links)
    collectives._probe_s()
    after: int = sum(link.num_to_send for link in links)
    return after - before


def test_more_ranks_do_not_take_a_link_for_slow() -> None:
    """As large sums, what a rank sends to find out is shared out among the others."""
    (two, *_), (four, *_) = (run_ranks(size, bytes_of_the_probe, config=TCP) for size in (2, 4))
    assert abs(four - two) < 0.01 * two


def transports(group: RankGroup) -> dict[str, str]:
    return {axis.value: name for axis, name in group.transports.items()}


def test_ranks_of_one_host_share_memory() -> None:
    shm = {"world": "shm", "tp": "shm", "pp": "shm", "expert_tp": "shm"}
    assert run_ranks("tp=2,pp=2", transports) == [shm] * 4
    assert (
        run_ranks("tp=2", transports, config=TCP)
        == [dict.fromkeys(("world", "tp", "expert_tp"), "gloo")] * 2
    )


def reduce_on_every_axis(group: RankGroup) -> dict[str, list[float]]:
    found = {}
    for name in ("tp", "pp", "ep", "sp", "dp", "expert_tp", "world"):
        axis = getattr(group.axes, name)
        ranks = axis.all_gather(torch.tensor([float(group.rank)]))
        found[name] = ranks.tolist()
    return found


def test_each_axis_talks_to_its_own_ranks() -> None:
    found = run_ranks("dp=2,pp=2,tp=2,ep=4", reduce_on_every_axis)
    assert found[5] == {
        "tp": [4, 5],
        "pp": [5, 7],
        "ep": [0, 1, 4, 5],
        "sp": [5],
        "dp": [1, 5],
        "expert_tp": [5],
        "world": [0, 1, 2, 3, 4, 5, 6, 7],
    }


def broadcast_text(group: RankGroup, text: bytes) -> bytes:
    mine = text if group.rank == 1 else None
    return group.axes.world.broadcast_bytes(mine, 1, max_bytes=1 << 20)


@pytest.mark.parametrize("text", [b"", b"step", b"x" * 300_000])
def test_bytes_of_any_length_are_broadcast(text: bytes) -> None:
    assert run_ranks(3, broadcast_text, text) == [text] * 3


def traffic_of_calls(group: RankGroup) -> list[float]:
    group.traffic.take()
    group.axes.tp.all_reduce(torch.ones(100))
    group.axes.pp.all_gather(torch.ones(10, dtype=torch.bfloat16))
    report = group.traffic.take()
    return [report.num_calls, report.num_bytes, report.seconds]


def test_what_all_axes_move_is_counted() -> None:
    for num_calls, num_bytes, seconds in run_ranks("tp=2,pp=2", traffic_of_calls):
        assert (num_calls, num_bytes) == (2, 400 + 40)
        assert 0 < seconds < 10


def reduce_with_special_values(group: RankGroup, dtype_name: str) -> list[torch.Tensor]:
    dtype = getattr(torch, dtype_name)
    finfo = torch.finfo(dtype)
    values = [0.0, -0.0, finfo.tiny, finfo.smallest_normal / 4, finfo.max, -finfo.max, 1.0]
    values += [float("inf"), float("-inf"), float("nan"), 1 + finfo.eps, 2049.0, 3.0, 65504.0]
    mine = torch.tensor(values, dtype=dtype)
    other = torch.tensor([*values[3:], *values[:3]], dtype=dtype)
    found = group.axes.tp.all_reduce((mine if group.rank == 0 else other).clone())
    return [found, (mine.float() + other.float()).to(dtype)]


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])
def test_extreme_values_are_rounded_as_torch_does(dtype_name: str) -> None:
    for found, expected in run_ranks(2, reduce_with_special_values, dtype_name):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def reduce_every_half(group: RankGroup, dtype_name: str) -> list[bool]:
    dtype = getattr(torch, dtype_name)
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    shifted = every.roll(12345)
    found = group.axes.tp.all_reduce((every if group.rank == 0 else shifted).clone())
    expected = (every.float() + shifted.float()).to(dtype)
    is_same = (found == expected) | (found.isnan() & expected.isnan())
    return [bool(is_same.all())]


@pytest.mark.parametrize("dtype_name", ["float16", "bfloat16"])
def test_every_16_bit_number_is_summed_right(dtype_name: str) -> None:
    assert run_ranks(2, reduce_every_half, dtype_name) == [[True]] * 2
