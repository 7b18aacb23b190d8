"""Blocks are conserved, cached prefixes survive until their blocks are needed."""

import hashlib
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import CapacityError
from engine.scheduling.block_hash import block_hashes
from engine.scheduling.block_pool import BlockPool


@given(st.lists(st.integers(1, 6), max_size=20))
def test_blocks_are_conserved(sizes):
    pool = BlockPool(16)
    held = [pool.allocate(size) for size in sizes if size <= pool.num_free]
    taken = [block_id for block_ids in held for block_id in block_ids]
    assert len(set(taken)) == len(taken) == 16 - pool.num_free
    pool.check_conservation()
    for block_ids in held:
        assert pool.release(block_ids) == len(block_ids)
    assert pool.num_free == 16
    pool.check_conservation()


def test_allocation_is_all_or_nothing():
    pool = BlockPool(4)
    pool.allocate(2)
    with pytest.raises(CapacityError):
        pool.allocate(3)
    assert pool.num_free == 2
    pool.check_conservation()


def test_double_release_is_noticed():
    pool = BlockPool(2)
    block_ids = pool.allocate(1)
    pool.release(block_ids)
    with pytest.raises(AssertionError, match="released twice"):
        pool.release(block_ids)


def cached_pool(num_blocks: int, hashes: list[bytes]) -> tuple[BlockPool, list[int]]:
    pool = BlockPool(num_blocks)
    block_ids = pool.allocate(len(hashes))
    for block_id, block_hash in zip(block_ids, hashes, strict=True):
        pool.register(block_id, block_hash)
    pool.release(block_ids)
    return pool, block_ids


HASHES = block_hashes(range(64), 16)


def test_released_blocks_are_found_again():
    pool, block_ids = cached_pool(8, HASHES)
    assert pool.cached_prefix(HASHES) == block_ids
    assert pool.allocate(5, pool.cached_prefix(HASHES))[:4] == block_ids
    pool.check_conservation()


def test_a_hole_ends_the_prefix():
    pool, block_ids = cached_pool(8, HASHES)
    assert pool.cached_prefix([HASHES[0], b"?" * 32, HASHES[2]]) == block_ids[:1]


def test_tail_of_a_prefix_is_evicted_first():
    pool, block_ids = cached_pool(4, HASHES)
    pool.allocate(1)
    assert pool.cached_prefix(HASHES) == block_ids[:3]
    pool.check_conservation()


def test_uncached_blocks_are_reused_before_cached_ones():
    pool, block_ids = cached_pool(8, HASHES)
    uncached = pool.allocate(4)
    pool.release(uncached)
    assert set(pool.allocate(4)) == set(uncached)
    assert pool.cached_prefix(HASHES) == block_ids


def test_shared_blocks_are_free_after_the_last_release():
    pool, _ = cached_pool(8, HASHES)
    first = pool.allocate(4, pool.cached_prefix(HASHES))
    second = pool.allocate(4, pool.cached_prefix(HASHES))
    assert first == second
    assert pool.release(first) == 0
    assert pool.release(second) == 4


def test_cached_free_blocks_count_as_taken():
    pool, block_ids = cached_pool(4, HASHES)
    with pytest.raises(CapacityError):
        pool.allocate(5, block_ids)
    pool.check_conservation()
    assert pool.num_free == 4


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "drop"]), st.integers(0, 7), st.integers(1, 5)),
        max_size=60,
    )
)
def test_random_use_keeps_the_tables_in_step(operations):
    prompts = [block_hashes([prompt // 2] * 16 + [prompt] * 64, 16) for prompt in range(8)]
    pool, held = BlockPool(12), []
    for operation, prompt, size in operations:
        if operation == "take":
            cached = pool.cached_prefix(prompts[prompt][:size])
            if pool.num_taken_by(size, cached) > pool.num_free:
                continue
            block_ids = pool.allocate(size, cached)
            assert len(set(block_ids)) == size
            for block_id, block_hash in zip(block_ids, prompts[prompt], strict=False):
                pool.register(block_id, block_hash)
            held.append(block_ids)
        elif held:
            pool.release(held.pop(prompt % len(held)))
        pool.check_conservation()
    for block_ids in held:
        pool.release(block_ids)
    assert pool.num_free == 12


def reference_hashes(token_ids: list[int], block_size: int) -> list[bytes]:
    hashes, previous = [], bytes(32)
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = b"".join(struct.pack("<I", t) for t in token_ids[start : start + block_size])
        previous = hashlib.sha256(previous + block).digest()
        hashes.append(previous)
    return hashes


@given(st.lists(st.integers(0, 2**32 - 1), max_size=70), st.integers(1, 17))
def test_hashes_are_the_documented_ones(token_ids, block_size):
    assert block_hashes(token_ids, block_size) == reference_hashes(token_ids, block_size)


def test_hashes_are_stable_between_versions():
    assert [h.hex() for h in block_hashes(range(32), 16)] == [
        "aa330374288acbdcb5008f2959fd6df7d265c735fbb9b4b4c42ec2036accd6d3",
        "8f3d3a653ef4f75ccd8845b6a76dd246da5b5e735809babef53877d21125357c",
    ]


def test_salt_changes_every_hash():
    plain, salted = block_hashes(range(64), 16), block_hashes(range(64), 16, salt=9)
    assert not set(plain) & set(salted)


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40))
def test_hashes_agree_exactly_on_the_common_prefix(left, right):
    common = 0
    while common < min(len(left), len(right)) and left[common] == right[common]:
        common += 1
    pairs = list(zip(block_hashes(left, 4), block_hashes(right, 4), strict=False))
    assert [a == b for a, b in pairs] == [index < common // 4 for index in range(len(pairs))]
