"""GGUF files: the header, each quantisation against the same weights in a directory, and damage."""

import dataclasses
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from engine.checkpoint import GgufFile, default_cache_dir, read_config
from engine.checkpoint.demo import DEMO_FILE_NAME
from engine.errors import CheckpointError
from engine.kernels.torch_kernels import TorchKernels
from engine.models.build import load_model
from engine.weights import open_weights
from tests.checkpoints import export_hf, tiny_checkpoint, write_gguf
from tests.unit.test_model_parity import EXPERTS, PROMPT, Runner, assert_close, reference_logits

WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
"""Rows of K formats are multiples of 256."""
QUANTIZATIONS = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                 "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # fmt: skip


PHI_LONGROPE: dict[str, Any] = {
    "original_max_position_embeddings": 64,
    "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 0.75,
        "short_factor": [1.0 + 0.5 * index for index in range(6)],
        "long_factor": [2.0 + 0.5 * index for index in range(6)],
    },
}  # fmt: skip


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path, kernels=TorchKernels(torch.device("cpu")), dtype="float32")
    (logits,) = Runner(model, [PROMPT]).step([len(PROMPT)])
    return logits


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_logits_equal_those_of_the_dequantised_directory(quantization: str, tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path, "llama", **WIDE)
    path = write_gguf(directory, tmp_path / "model.gguf", quantization)
    with open_weights(path, read_config(path)) as weights:
        tensors = {name: weights.read(name).contiguous() for name in weights.names}
    if quantization.startswith(("F", "BF", "Q8", "Q5_0", "Q5_1", "Q4_0", "Q4_1")):
        with open_weights(directory, read_config(directory)) as originals:
            for name in originals.names:
                error = (tensors[name] - originals.read(name)).abs().max()
                assert error < 0.1, name
    save_file(tensors, directory / "model.safetensors")
    actual = logits_of(path)
    assert_close(actual, reference_logits(directory, PROMPT, []))
    assert torch.equal(actual, logits_of(directory))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"tie_word_embeddings": True}),
        ("mistral", {"sliding_window": 24}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma2", {"sliding_window": 24, "query_pre_attn_scalar": 16,
                    "tie_word_embeddings": True}),
        ("gemma3_text", {"sliding_window": 24, "query_pre_attn_scalar": 16,
                         "num_hidden_layers": 7}),
        ("phi3", {}),
        ("phi3", {"sliding_window": 24, **PHI_LONGROPE}),
        ("olmo2", {}),
        ("granite", {"attention_multiplier": 0.25, "embedding_multiplier": 6.0,
                     "residual_multiplier": 0.5, "logits_scaling": 8.0}),
        ("qwen2_moe", EXPERTS),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    ],
    ids=["llama-bias", "llama-tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3",
         "phi3-longrope", "olmo2", "granite", "qwen2-moe", "qwen3-moe"],
)  # fmt: skip
def test_unquantised_file_equals_the_directory_it_was_made_from(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    directory = tiny_checkpoint(tmp_path, family, **overrides)
    path = write_gguf(directory, tmp_path / "model.gguf")
    assert torch.equal(logits_of(path), logits_of(directory))
    expected = read_config(directory)
    actual = read_config(path)
    assert actual.rms_norm_eps == pytest.approx(expected.rms_norm_eps)
    rope = dataclasses.replace(actual.rope, attention_factor=expected.rope.attention_factor)
    actual = dataclasses.replace(actual, rms_norm_eps=expected.rms_norm_eps, rope=rope)
    assert actual == expected


def test_rope_factors_in_a_tensor_act_as_llama3_scaling(tmp_path: Path) -> None:
    llama3 = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    scaled = tiny_checkpoint(tmp_path, "llama", seed=1, rope_parameters=llama3)
    plain = tiny_checkpoint(tmp_path, "llama", seed=2)
    (plain / "model.safetensors").write_bytes((scaled / "model.safetensors").read_bytes())
    path = write_gguf(plain, tmp_path / "plain.gguf")

    # What llama.cpp's converter computes from the same fields (LlamaModel.generate_extra_tensors).
    inverse = 1.0 / (10000.0 ** (np.arange(0, 16, 2) / 16))
    wavelength = 2 * np.pi / inverse
    smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
    between = 1 / ((1 - smooth) / 8.0 + smooth)
    factors = np.where(wavelength < 16, 1.0, np.where(wavelength > 64, 8.0, between))
    added = _with_tensor(path, "rope_freqs.weight", factors.astype(np.float32))

    assert read_config(added).rope.scaling == "factors"
    assert_close(logits_of(added), reference_logits(scaled, PROMPT, []))


def _with_tensor(path: Path, name: str, values: np.ndarray) -> Path:
    reader = gguf.GGUFReader(path)
    target = path.with_name("added.gguf")
    writer = gguf.GGUFWriter(target, "llama")
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = entry.types[-1] if len(entry.types) > 1 else None
            writer.add_key_value(key, entry.contents(), entry.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_metadata_equals_that_of_the_gguf_package(tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint(tmp_path), tmp_path / "model.gguf", "Q8_0")
    file = GgufFile(path)
    reader = gguf.GGUFReader(path)
    fields = {k: v.contents() for k, v in reader.fields.items() if not k.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert file.tensors.keys() == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        expected = np.atleast_2d(expected)
        assert np.array_equal(file.read(tensor.name), expected)
        columns = range(9, 41)  # of two blocks, neither of them whole
        found = file.read(tensor.name, range(len(expected) // 2), columns)
        assert np.array_equal(found, expected[: len(expected) // 2, 9:41])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.3, 0.9, 0.9999])
def test_truncated_file_is_named(share: float, tmp_path: Path) -> None:
    path = write_gguf(tiny_checkpoint(tmp_path), tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"model\.gguf"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"GGML" + bytes(60), "is not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0) + bytes(99), "has 0 dims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 62) + bytes(99), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 1 << 50), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 50), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(9), "type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQII", 3, 1, 0, 1, b"t", 2, 33, 7, 2, 0) + bytes(99),
         "impossible shape"),
        (b"GGUF" + struct.pack("<IQQQ1sIQQI", 3, 1, 0, 1, b"t", 2, 32, 7, 999) + bytes(99),
         "unknown type 999"),
    ],
)  # fmt: skip
def test_malformed_header_is_an_error_not_an_allocation(
    data: bytes, match: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=match):
        GgufFile(path)


def test_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"'mamba' is not supported; supported are .*llama"):
        read_config(path)


DEMO_PATH = default_cache_dir(os.environ) / DEMO_FILE_NAME


@pytest.mark.skipif(not DEMO_PATH.is_file(), reason="the demo model is not in the cache")
def test_demo_model_equals_transformers_on_its_exported_weights(tmp_path: Path) -> None:
    directory = export_hf(DEMO_PATH, tmp_path / "demo")
    actual = logits_of(DEMO_PATH)
    assert_close(actual, reference_logits(directory, PROMPT, []))
