from dataclasses import replace
from typing import Any

import pytest

from engine.errors import InvalidRequestError
from engine.kv_cache.layout import KvLayout
from kv_transfer import convert
from kv_transfer.group_layout import GroupLayout
from kv_transfer.offer import Offer, RankOffer, ShmOffer, TcpOffer
from kv_transfer.rank import convert as rank_convert
from kv_transfer.reshard import Box, Transfer
from kv_transfer.sending_rank import Target
from protos.isthmus.v1 import kv_transfer_pb2
from tests.fakes.kv_layouts import group_layout

LAYOUT = KvLayout(
    num_layers=30, num_kv_heads=3, head_dim=64, block_size_tokens=16, dtype="bfloat16"
)


def test_layouts_survive_the_wire() -> None:
    assert convert.layout_from(convert.layout_to_pb(LAYOUT)) == LAYOUT
    other = replace(LAYOUT, num_parts=1)
    assert convert.layout_from(convert.layout_to_pb(other)) == other
    assert convert.layout_from(convert.layout_to_pb(other)) != LAYOUT


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("head_dim", 2**32 - 1),
        ("dtype", "int4"),
        ("dtype", ""),
        ("num_parts", 0),
    ],
)
def test_a_layout_that_cannot_be_is_refused(field: str, value: Any) -> None:
    message = convert.layout_to_pb(LAYOUT)
    setattr(message, field, value)
    with pytest.raises(InvalidRequestError, match=field):
        convert.layout_from(message)


def test_an_empty_layout_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="num_layers"):
        convert.layout_from(kv_transfer_pb2.KvLayout())


def an_offer(layout: GroupLayout) -> Offer:
    ranks = [
        RankOffer(ShmOffer("/proc/1/fd/3", 10, b"n" * 16), None),
        RankOffer(None, TcpOffer("::1", 99)),
        RankOffer(None, None),
        RankOffer(ShmOffer("/proc/1/fd/4", 11, b"m" * 16), TcpOffer("10.0.0.1", 1)),
    ]
    return Offer("decode-0", 7, layout, 100, tuple(ranks))


def test_offers_of_a_group_survive_the_wire() -> None:
    offer = an_offer(group_layout(LAYOUT, num_query_heads=9, tp=2, pp=2))
    assert convert.offer_from(convert.offer_to_pb(offer)) == offer


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (lambda message: message.ClearField("ranks"), "1 to 1024 ranks, got 0"),
        (lambda message: message.ranks[1].layers.append(30), "rank 1 must hold distinct layers"),
        (lambda message: message.ranks[2].kv_heads.append(1), "rank 2 must hold distinct KV heads"),
        (lambda message: message.ranks.pop(), "no rank .* holds KV head 2 of layer 15"),
        (lambda message: message.ranks[0].layers.extend([1] * (1 << 17)), "above 131072"),
    ],
)
def test_ranks_that_are_no_worker_are_refused(spoil: Any, problem: str) -> None:
    message = convert.offer_to_pb(an_offer(group_layout(LAYOUT, num_query_heads=9, tp=2, pp=2)))
    spoil(message)
    with pytest.raises(InvalidRequestError, match=f"decode-0: .*{problem}"):
        convert.offer_from(message)


@pytest.mark.parametrize(
    ("hashes", "problem"),
    [
        ([b"a" * 32, b"b" * 32, b"a" * 32], "block_hashes names one block twice"),
        ([b"a" * 32, b"b" * 31], "must have 32 bytes each"),
        ([bytes([index]) * 32 for index in range(4)], "4 block hashes for 63 tokens"),
    ],
    ids=["twice", "short", "too-many"],
)
def test_hashes_that_no_prompt_has_are_refused(hashes: list[bytes], problem: str) -> None:
    message = kv_transfer_pb2.ReserveRequest(num_tokens=63, block_hashes=hashes)
    with pytest.raises(InvalidRequestError, match=problem):
        convert.block_hashes_from(message, 16)


@pytest.mark.parametrize("dtype", ["int8", "bfloat16"])
def test_a_target_of_rows_as_long_but_of_other_values_is_refused(dtype: str) -> None:
    """Between the ranks of a worker: rank 0 has compared the pools, its message is checked."""
    source = replace(LAYOUT, dtype=dtype)
    other = replace(source, dtype={"int8": "fp8", "bfloat16": "float16"}[dtype])
    box = Box(0, 30, 0, 3)
    target = Target(
        "decode-0", RankOffer(None, None), source, 8, "[::1]:1", (Transfer(0, 0, box, box),)
    )
    message = rank_convert.target_to_pb(target)
    assert rank_convert.target_from(message, source) == target
    with pytest.raises(InvalidRequestError, match=dtype):
        rank_convert.target_from(message, other)
