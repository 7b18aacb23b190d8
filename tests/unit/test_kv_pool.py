"""The KV pool: one memory, seen as tensors, as bytes and by other processes."""

import mmap
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import EngineConfig
from engine.kv_cache.layout import KvLayout
from engine.kv_cache.pool import KvPool
from engine.kv_cache.pool_plan import KvPoolTooSmallError, plan_kv_pool
from engine.kv_cache.shared_blocks import NONCE_BYTES
from kv_transfer import memory

LAYOUT = KvLayout(num_layers=3, num_kv_heads=2, head_dim=4, block_size_tokens=8, dtype="bfloat16")


@pytest.fixture
def pool():
    with KvPool(LAYOUT, 5, torch.device("cpu")) as pool:
        yield pool


def test_pool_is_a_kv_memory(pool):
    kv_memory: memory.KvMemory = pool
    assert kv_memory.num_blocks == 5
    assert memory.NONCE_BYTES == NONCE_BYTES


def test_layer_view_writes_the_blocks_bytes(pool):
    pool.layer(1)[4, 0, 1, 7] = torch.arange(4)
    block = bytes(pool.host_bytes[4 * LAYOUT.block_bytes :])
    row = ((1 * 2 + 0) * 2 + 1) * 8 + 7  # layer, key, head, slot
    expected = bytes(torch.arange(4).to(torch.bfloat16).view(torch.uint8).tolist())
    assert block[row * 8 : row * 8 + 8] == expected


def test_another_mapping_of_the_fd_sees_blocks_and_nonce(pool):
    pool.blocks_PLJGCA.fill_(1)
    path = Path(f"/proc/{os.getpid()}/fd/{pool.shared_fd}")
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as other:
        assert other[pool.num_bytes :] == pool.nonce
        assert len(pool.nonce) == NONCE_BYTES
        assert other[: pool.num_bytes] == bytes(pool.host_bytes)
        other[0:2] = b"\x00\x40"  # 2.0 in bfloat16
    assert pool.blocks_PLJGCA[0, 0, 0, 0, 0, 0].item() == 2.0


def test_blocks_read_are_blocks_written(pool):
    pool.blocks_PLJGCA.copy_(torch.randn(pool.blocks_PLJGCA.shape))
    data = pool.read_blocks([3, 1])
    with KvPool(LAYOUT, 2, torch.device("cpu")) as other:
        whole = {"layers": slice(0, 3), "heads": slice(0, 2), "slots": slice(0, 8)}
        other.write_slots(1, **whole, data=data[: LAYOUT.block_bytes])
        other.write_slots(0, **whole, data=data[LAYOUT.block_bytes :])
        torch.testing.assert_close(other.blocks_PLJGCA[1], pool.blocks_PLJGCA[3])
        torch.testing.assert_close(other.blocks_PLJGCA[0], pool.blocks_PLJGCA[1])


def test_slots_of_a_box_are_written_and_nothing_else(pool):
    new_LJGCA = torch.randn(2, 2, 1, 3, 4).to(torch.bfloat16)
    data = memoryview(new_LJGCA.flatten().view(torch.uint8).numpy().data)
    box = {"layers": slice(1, 3), "heads": slice(1, 2), "slots": slice(2, 5)}
    expected = pool.blocks_PLJGCA.clone()
    expected[4, 1:3, :, 1:2, 2:5] = new_LJGCA
    pool.write_slots(4, **box, data=data)
    torch.testing.assert_close(pool.blocks_PLJGCA, expected)


@pytest.mark.parametrize(
    ("block_id", "num_bytes"),
    [(5, LAYOUT.block_bytes), (-1, LAYOUT.block_bytes), (0, LAYOUT.block_bytes + 1), (0, 0)],
)
def test_wrong_slots_are_refused(pool, block_id, num_bytes):
    whole = {"layers": slice(0, 3), "heads": slice(0, 2), "slots": slice(0, 8)}
    with pytest.raises(ValueError, match="block"):
        pool.write_slots(block_id, **whole, data=memoryview(bytes(num_bytes)))


def test_closed_pool_has_no_descriptor(pool):
    fd = pool.shared_fd
    pool.close()
    assert pool.shared_fd is None
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def plan(config: EngineConfig, free_bytes: int, *, max_context_tokens: int = 64):
    return plan_kv_pool(
        config,
        LAYOUT,
        device_type="cpu",
        free_bytes=free_bytes,
        max_context_tokens=max_context_tokens,
    )


def test_plan_takes_the_bytes_asked_for():
    config = EngineConfig(kv_pool_bytes=LAYOUT.block_bytes * 20 + 1)
    assert plan(config, 1 << 30).num_blocks == 20


def test_plan_stops_at_what_the_sequences_could_use():
    assert plan(EngineConfig(max_num_sequences=2), 1 << 30).num_blocks == 16


def test_a_small_host_gives_two_contexts_or_half_of_what_is_free():
    context_bytes = 8 * LAYOUT.block_bytes
    assert plan(EngineConfig(), 10 * context_bytes).num_blocks == 16
    assert plan(EngineConfig(), 3 * context_bytes).num_blocks == 12
    assert plan(EngineConfig(), 100 * context_bytes).num_blocks == 40


def test_plan_names_what_to_change_when_one_sequence_does_not_fit():
    with pytest.raises(KvPoolTooSmallError, match="lower max_context_tokens"):
        plan(EngineConfig(kv_pool_bytes=LAYOUT.block_bytes * 7), 1 << 30)


def test_scaled_rows_give_nearly_twice_the_tokens_of_bfloat16_and_four_times_those_of_float32():
    def num_tokens(dtype: str) -> int:
        layout = replace(LAYOUT, head_dim=64, dtype=dtype)
        config = EngineConfig(kv_pool_bytes=1 << 24, max_num_sequences=10_000,
                              max_num_batched_tokens=20_000)  # fmt: skip
        planned = plan_kv_pool(
            config, layout, device_type="cpu", free_bytes=1 << 30, max_context_tokens=64
        )
        return planned.num_blocks * layout.block_size_tokens

    for scaled in ("int8", "fp8"):
        assert num_tokens(scaled) / num_tokens("bfloat16") == pytest.approx(128 / 68, rel=1e-2)
        assert num_tokens(scaled) / num_tokens("float32") == pytest.approx(256 / 68, rel=1e-2)


def test_plan_refuses_more_than_is_free():
    with pytest.raises(KvPoolTooSmallError, match="lower kv_pool_bytes"):
        plan(EngineConfig(kv_pool_bytes=1 << 31), 1 << 30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_pool_reads_what_was_written():
    pool = KvPool(LAYOUT, 4, torch.device("cuda"))
    assert pool.host_bytes is None
    assert pool.shared_fd is None
    data = memoryview(os.urandom(LAYOUT.block_bytes))
    pool.write_slots(2, layers=slice(0, 3), heads=slice(0, 2), slots=slice(0, 8), data=data)
    assert bytes(pool.read_blocks([2])) == bytes(data)
    part = os.urandom(2 * 2 * 4 * 2)
    pool.write_slots(
        2, layers=slice(1, 3), heads=slice(1, 2), slots=slice(7, 8), data=memoryview(part)
    )
    written = pool.blocks_PLJGCA[2, 1:3, :, 1:2, 7:8].cpu().flatten().view(torch.uint8)
    assert bytes(written.tolist()) == part
