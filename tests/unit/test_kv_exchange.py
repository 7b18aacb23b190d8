import pytest

from engine.parallel.kv_exchange import (
    RING_MIN_CONTEXT_TOKENS,
    RING_MIN_PART_BYTES,
    KvExchange,
    kv_exchange_for,
)

LARGE = {"part_bytes": RING_MIN_PART_BYTES, "context_tokens": RING_MIN_CONTEXT_TOKENS}


def test_large_parts_before_long_contexts_go_round_a_ring_between_hosts() -> None:
    assert kv_exchange_for("gloo", **LARGE) is KvExchange.RING


@pytest.mark.parametrize("name", LARGE)
def test_keys_are_gathered_where_one_of_the_sizes_is_smaller(name: str) -> None:
    assert kv_exchange_for("gloo", **{**LARGE, name: LARGE[name] - 1}) is KvExchange.GATHER


@pytest.mark.parametrize("transport", ["shm", "nccl"])
def test_keys_are_gathered_where_nothing_could_travel_in_the_background(transport: str) -> None:
    assert kv_exchange_for(transport, part_bytes=1 << 40, context_tokens=1 << 40) is (
        KvExchange.GATHER
    )
