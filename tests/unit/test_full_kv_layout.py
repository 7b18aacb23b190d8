"""What a store computes from a checkpoint's header is the layout of the engine that loads it."""

import pytest

from engine.checkpoint.read import read_config
from engine.config import EngineConfig
from engine.kv_cache.full_layout import full_kv_layout
from engine.runtime.build import build_engine
from tests.checkpoints import tiny_checkpoint
from tests.unit.test_model_parity import CASES


@pytest.mark.parametrize(
    ("family", "kv_dtype"),
    [("llama", "auto"), ("gemma3", "int8"), ("deepseek-v3", "fp8"), ("gpt-oss", "auto")],
)
def test_layout_is_the_engines(tmp_path, family, kv_dtype):
    case = CASES[family]
    checkpoint = tiny_checkpoint(tmp_path, case.family, **case.overrides)
    config = EngineConfig(
        device="cpu",
        kv_pool_bytes=1 << 24,
        max_context_tokens=100,
        block_size_tokens=8,
        num_threads=1,
        kv_dtype=kv_dtype,
    )
    engine = build_engine(checkpoint, config)
    try:
        assert full_kv_layout(read_config(checkpoint), config) == engine.full_kv_layout
        assert engine.full_kv_layout.dtype == ("float32" if kv_dtype == "auto" else kv_dtype)
    finally:
        engine.close()
