"""DeepSeek-V3's own checkpoint format: FP8 with a scale a block, and a layer that is not used."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.checkpoint import read_config
from engine.errors import CheckpointError
from engine.kernels.torch_kernels import TorchKernels
from engine.models.build import load_model
from engine.weights import open_weights
from tests.checkpoints import tiny_checkpoint
from tests.unit.test_model_parity import CASES, PROMPT, Runner, assert_close, reference_logits

ROWS, COLUMNS = 16, 24
NAME = "model.layers.1.self_attn.kv_b_proj.weight"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    case = CASES["deepseek-v3"]
    return tiny_checkpoint(tmp_path / "plain", case.family, **case.overrides)


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    """`plain` in FP8; its own matrices become the values, so that both are the same model."""
    path = tmp_path / "packed"
    path.mkdir()
    tensors = load_file(plain / "model.safetensors")
    stored = {"model.layers.3.surplus.weight": torch.ones(2)}
    for name, values in tensors.items():
        if not name.endswith("_proj.weight") and "kv_a_proj" not in name:
            stored[name] = values
            continue
        blocks = [
            -(-size // step) for size, step in zip(values.shape, (ROWS, COLUMNS), strict=True)
        ]
        scales = torch.empty(blocks)
        coded = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
        for row in range(blocks[0]):
            for column in range(blocks[1]):
                box = (
                    slice(row * ROWS, (row + 1) * ROWS),
                    slice(column * COLUMNS, (column + 1) * COLUMNS),
                )
                scales[row, column] = values[box].abs().max() / 448
                coded[box] = (values[box] / scales[row, column]).to(torch.float8_e4m3fn)
                values[box] = coded[box].float() * scales[row, column]
        stored |= {name: coded, f"{name}_scale_inv": scales}
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
    edit = {
        "num_nextn_predict_layers": 1,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [ROWS, COLUMNS],
        },
    }
    config = json.loads((plain / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **edit}))
    return path


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path, kernels=TorchKernels(torch.device("cpu")), dtype="float32")
    (logits,) = Runner(model, [PROMPT]).step([len(PROMPT)])
    return logits


def test_scaled_blocks_equal_their_values(packed: Path, plain: Path) -> None:
    logits = logits_of(packed)
    assert torch.equal(logits, logits_of(plain))
    assert_close(logits, reference_logits(plain, PROMPT, []))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_slice_is_that_of_the_whole(dim: int, packed: Path) -> None:
    with open_weights(packed, read_config(packed)) as weights:
        whole = weights.read(NAME)
        for start, length in ((0, 5), (7, 20)):
            part = weights.read(NAME, dim, start, length)
            assert torch.equal(part, whole.narrow(dim, start, length))


def test_scales_of_another_size_are_named(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, 128]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not go with scales of .* \[128, 128\]"):
        logits_of(packed)


@pytest.mark.parametrize("shape", [None, [128], [0, 128], [128, "128"], [1 << 40, 1]])
def test_blocks_that_are_not_two_sizes_are_refused(shape: object, packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = shape
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not two sizes"):
        read_config(packed)


def test_a_float_matrix_with_scales_is_refused(packed: Path) -> None:
    tensors = load_file(packed / "model.safetensors")
    tensors[NAME] = tensors[NAME].float()
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match="stored as F32, F8_E4M3 is expected"):
        logits_of(packed)


def test_a_layer_behind_the_last_is_surplus_unless_it_predicts(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"holds model\.layers\.3\.surplus"):
        logits_of(packed)
