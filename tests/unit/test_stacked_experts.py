"""gpt-oss' own checkpoint format: MXFP4 experts, one tensor a layer; damage to it is named."""

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
from engine.weights.stacked_experts import dequantized
from tests.checkpoints import tiny_checkpoint
from tests.unit.test_model_parity import CASES, PROMPT, Runner, assert_close, reference_logits

CPU = torch.device("cpu")
LAYER = "model.layers.1.mlp.experts"


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    case = CASES["gpt-oss"]
    return tiny_checkpoint(tmp_path / "plain", case.family, **case.overrides)


@pytest.fixture
def packed(plain: Path, tmp_path: Path) -> Path:
    """Random MXFP4 experts; those of `plain` become their values, as transformers unpacks them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    path = tmp_path / "packed"
    path.mkdir()
    tensors = load_file(plain / "model.safetensors")
    packed_tensors = dict(tensors)
    generator = torch.Generator().manual_seed(5)
    for name, values in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            num_experts, inner, outer = values.shape
            shape = (num_experts, outer, inner // 32, 16)
            blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 125, shape[:3], generator=generator, dtype=torch.uint8)
            del packed_tensors[name]
            packed_tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
            tensors[name] = unpacked.contiguous()
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(packed_tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": []}
    (path / "config.json").write_text(json.dumps(config))
    return path


def logits_of(path: Path) -> torch.Tensor:
    model = load_model(path, kernels=TorchKernels(CPU), dtype="float32")
    (logits,) = Runner(model, [PROMPT]).step([len(PROMPT)])
    return logits


def test_four_bit_experts_equal_their_values(packed: Path, plain: Path) -> None:
    logits = logits_of(packed)
    assert torch.equal(logits, logits_of(plain))
    assert_close(logits, reference_logits(plain, PROMPT, []))


def test_a_slice_of_an_expert_is_that_of_the_whole(packed: Path) -> None:
    with open_weights(packed, read_config(packed)) as weights:
        for part, dim in (("up_proj", 0), ("down_proj", 1)):
            name = f"{LAYER}.2.{part}.weight"
            whole = weights.read(name)
            assert tuple(whole.shape) == weights.shape(name)
            assert torch.equal(weights.read(name, dim, 8, 16), whole.narrow(dim, 8, 16))
        assert weights.location(f"{LAYER}.2.up_proj.bias").endswith("_bias, expert 2")


def test_values_of_all_codes() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    scales = torch.arange(120, 136, dtype=torch.uint8).view(1, 16)
    values = dequantized(codes, scales).view(16, 32)
    assert values[0, 2] == 0.5 * 2.0 ** (120 - 127)  # code 0x01: its low half comes first
    assert values[15, 31] == -6.0 * 2.0 ** (135 - 127)
    assert values.unique().numel() > 15


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("no-scales", f"lacks {LAYER}.down_proj_scales"),
        ("short-scales", "does not go with scales"),
        ("floats", "stored as F32, bytes are expected"),
        ("flat", "does not hold 1 to"),
    ],
)
def test_damage_is_named(change: str, match: str, packed: Path) -> None:
    file, name = packed / "model.safetensors", f"{LAYER}.down_proj"
    tensors = load_file(file)
    if change == "no-scales":
        del tensors[f"{name}_scales"]
    elif change == "short-scales":
        tensors[f"{name}_scales"] = tensors[f"{name}_scales"][:, :-1].contiguous()
    elif change == "floats":
        tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"].float()
    else:
        tensors[f"{name}_blocks"] = tensors[f"{name}_blocks"].flatten()
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=match):
        logits_of(packed)


def test_another_quantisation_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["quant_method"] = "fp8"
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantised \\('fp8'\\)"):
        read_config(packed)
